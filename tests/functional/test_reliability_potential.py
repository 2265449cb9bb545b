"""`reliability_potential`, Eq. 11–13."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import reliability_potential, unit_length
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sample(seed: int, batch: int = 5, crossed: int = 3, own: int = 3, width: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, width), (batch, crossed, width), (batch, own, width)]
    return [unit_length(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


@pytest.mark.parametrize("own", [1, 3, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_agrees_with_reference(dtype, tolerance, own):
    inputs = sample(0, own=own)
    potential = reliability_potential(*(x.to(dtype) for x in inputs))
    expected = reference.reliability_potential(*(x.numpy() for x in inputs))
    assert potential.shape == (5,)
    assert potential.dtype == dtype
    np.testing.assert_allclose(potential.double().numpy(), expected, rtol=tolerance)


@pytest.mark.parametrize(("direction", "expected"), [(1.0, math.e), (-1.0, 1 / math.e), (0.0, 1.0)])
def test_extremes(direction, expected):
    u = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    found = torch.tensor([direction, math.sqrt(1 - direction**2)], dtype=torch.float64).expand(1, 4, 2)
    assert reliability_potential(u, found, found).item() == pytest.approx(expected, rel=1e-14)


@PROPERTY
@given(seed=st.integers(0, 10_000), crossed=st.integers(1, 12), own=st.integers(1, 12))
def test_lies_between_one_over_e_and_e_for_unit_vectors(seed, crossed, own):
    reliability = -reliability_potential(*sample(seed, crossed=crossed, own=own)).log()
    assert reliability.abs().max() <= 1 + 1e-12


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_permuting_batch_permutes_result_and_order_of_neighbors_is_immaterial(seed):
    u, crossed, own = sample(seed, crossed=4)
    generator = torch.Generator().manual_seed(seed)
    batch, first, second = (torch.randperm(n, generator=generator) for n in (5, 4, 3))
    expected = reliability_potential(u, crossed, own)[batch]
    permuted = reliability_potential(u[batch], crossed[batch][:, first], own[batch][:, second])
    torch.testing.assert_close(permuted, expected, rtol=1e-14, atol=0)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_samples_do_not_influence_each_other(seed):
    inputs = sample(seed)
    alone = torch.cat([reliability_potential(*(x[i : i + 1] for x in inputs)) for i in range(5)])
    torch.testing.assert_close(alone, reliability_potential(*inputs), rtol=1e-14, atol=0)


def test_neighbor_that_agrees_with_the_own_ones_weighs_more():
    u = torch.tensor([[1.0, 0.0]])
    crossed = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    trusted = reliability_potential(u, crossed, own=crossed[:, :1])
    distrusted = reliability_potential(u, crossed, own=crossed[:, 1:])
    assert trusted > math.cosh(1) > distrusted  # cosh 1 is the potential under equal weights


def test_gradcheck():
    assert torch.autograd.gradcheck(reliability_potential, [x.requires_grad_() for x in sample(0, own=2)])


def test_mean_of_the_own_neighbors_is_all_that_counts_of_them():
    embeddings, crossed, own = sample(0)
    expected = reliability_potential(embeddings, crossed, own)
    assert torch.equal(reliability_potential(embeddings, crossed, own.mean(dim=1)), expected)


def test_gradient_is_that_with_neighbors_in_the_graph():
    embeddings, crossed, own = sample(0)
    embeddings.requires_grad_()
    alone, with_neighbors = (
        torch.autograd.grad(reliability_potential(embeddings, neighbors, own).log().sum(), embeddings)[0]
        for neighbors in (crossed, crossed.clone().requires_grad_())
    )
    torch.testing.assert_close(alone, with_neighbors)


def test_gradient_of_the_gradient():
    embeddings, crossed, own = sample(0)
    embeddings.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda u: reliability_potential(u, crossed, own), embeddings)
