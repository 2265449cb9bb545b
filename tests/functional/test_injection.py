"""`inject_knowledge`, Eq. 9."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import inject_knowledge, unit_length
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sample(
    seed: int, batch: int = 5, neighbors: int = 3, width: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    found = torch.randn(batch, neighbors, width, generator=generator, dtype=torch.float64)
    return unit_length(u), unit_length(found)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.9, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 2e-7)])
def test_agrees_with_reference(dtype, tolerance, ratio, renormalize):
    u, found = sample(0)
    injected = inject_knowledge(u.to(dtype), found.to(dtype), ratio, renormalize=renormalize)
    expected = reference.inject_knowledge(u.numpy(), found.numpy(), ratio, renormalize)
    assert injected.dtype == dtype
    np.testing.assert_allclose(injected.double().numpy(), expected, rtol=0, atol=tolerance)


def test_default_share_of_knowledge_is_one_fifth():
    u, found = sample(0)
    assert torch.equal(inject_knowledge(u, found), inject_knowledge(u, found, 0.2))


@PROPERTY
@given(seed=st.integers(0, 10_000), renormalize=st.booleans())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ratio_zero_is_the_plain_embedding_bit_for_bit(dtype, seed, renormalize):
    u, found = (x.to(dtype) for x in sample(seed))
    assert torch.equal(inject_knowledge(u, found, 0.0, renormalize=renormalize), u)


def test_ratio_zero_passes_the_gradient_bit_for_bit():
    u, found = sample(0)
    incoming = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=u.dtype)
    u.requires_grad_()
    (gradient,) = torch.autograd.grad(inject_knowledge(u, found, 0.0), u, incoming)
    assert torch.equal(gradient, incoming)


@PROPERTY
@given(seed=st.integers(0, 10_000), ratio=st.floats(0, 1))
def test_permuting_batch_permutes_result_and_order_of_neighbors_is_immaterial(seed, ratio):
    u, found = sample(seed)
    batch = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed + 1))
    expected = inject_knowledge(u, found, ratio)[batch]
    torch.testing.assert_close(
        inject_knowledge(u[batch], found[batch][:, order], ratio), expected, rtol=0, atol=1e-15
    )


@PROPERTY
@given(seed=st.integers(0, 10_000), ratio=st.floats(0, 1))
def test_result_of_unit_vectors_is_no_longer_than_one(seed, ratio):
    injected = inject_knowledge(*sample(seed), ratio)
    assert torch.linalg.vector_norm(injected, dim=1).max() <= 1 + 1e-12


def test_neighbors_equal_to_the_embedding_change_nothing():
    u, _ = sample(0)
    torch.testing.assert_close(inject_knowledge(u, u[:, None].repeat(1, 3, 1), 0.7), u, rtol=0, atol=1e-15)


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck(renormalize):
    u, found = sample(0)
    assert torch.autograd.gradcheck(
        lambda u, found: inject_knowledge(u, found, 0.3, renormalize=renormalize),
        (u.requires_grad_(), found.requires_grad_()),
    )
