"""`unit_length`: rows of length one, zero rows and unit rows as they are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import unit_length
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def rows(seed: int, batch: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, width, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 2e-7)])
def test_agrees_with_reference(dtype, tolerance):
    embeddings = rows(0, 6, 5, dtype)
    expected = reference.unit_length(embeddings.double().numpy())
    np.testing.assert_allclose(unit_length(embeddings).double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_and_shape_with_leading_axes(dtype):
    tokens = rows(0, 6, 5, dtype).reshape(2, 3, 5)
    normalised = unit_length(tokens)
    assert normalised.dtype == dtype
    assert normalised.shape == (2, 3, 5)
    torch.testing.assert_close(
        torch.linalg.vector_norm(normalised.double(), dim=-1),
        torch.ones(2, 3, dtype=torch.float64),
        rtol=0,
        atol=4 * torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_rows_in_half_precision(dtype):
    """Their length is more than float16 can hold, although they are not."""
    embeddings = torch.full((2, 512), 6e4, dtype=dtype).requires_grad_()
    expected = torch.full((2, 512), 512**-0.5, dtype=dtype)
    normalised = unit_length(embeddings)
    torch.testing.assert_close(normalised, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    normalised.sum().backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unit_rows_in_half_precision_pass_bit_for_bit(dtype):
    unit = F.normalize(rows(0, 64, 128, torch.float32), dim=1).to(dtype)
    unit = unit[torch.linalg.vector_norm(unit, dim=1) == 1]  # but for rounding
    assert len(unit) > 16
    assert torch.equal(unit_length(unit), unit)


@PROPERTY
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 64), width=st.sampled_from([1, 2, 7, 128, 1024]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unit_rows_pass_bit_for_bit(dtype, seed, batch, width):
    unit = F.normalize(rows(seed, batch, width, dtype), dim=1)
    assert torch.equal(unit_length(unit), unit)
    assert torch.equal(unit_length(unit_length(unit)), unit)


@PROPERTY
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 16), width=st.integers(1, 64))
def test_ignores_positive_scale(seed, batch, width):
    embeddings = rows(seed, batch, width)
    torch.testing.assert_close(
        unit_length(4096 * embeddings), unit_length(embeddings), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_stay_zero_with_finite_gradients(dtype):
    embeddings = rows(0, 4, 3, dtype)
    embeddings[[1, 3]] = 0
    embeddings.requires_grad_()
    normalised = unit_length(embeddings)
    assert torch.equal(normalised[[1, 3]], torch.zeros(2, 3, dtype=dtype))
    normalised.sum().backward()
    assert embeddings.grad.isfinite().all()


def test_a_batch_of_zeros_stays_zero():
    embeddings = torch.zeros(3, 4, requires_grad=True)
    normalised = unit_length(embeddings)
    normalised.square().sum().backward()
    assert torch.equal(normalised, torch.zeros(3, 4))
    assert embeddings.grad.isfinite().all()


def test_unit_rows_pass_their_gradient_bit_for_bit():
    unit = F.normalize(rows(0, 4, 3, torch.float32), dim=1).requires_grad_()
    incoming = rows(1, 4, 3, torch.float32)
    unit_length(unit).backward(incoming)
    assert torch.equal(unit.grad, incoming)


def test_same_value_and_gradient_as_torch_normalize():
    embeddings = rows(0, 4, 3).requires_grad_()
    incoming = rows(1, 4, 3)
    ours, theirs = unit_length(embeddings), F.normalize(embeddings, dim=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(ours, embeddings, incoming)
    (expected,) = torch.autograd.grad(theirs, embeddings, incoming)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_gradcheck():
    assert torch.autograd.gradcheck(unit_length, rows(0, 4, 3).requires_grad_())
