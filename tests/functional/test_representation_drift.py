"""`representation_drift`, Eq. 4, with the bound of Eq. 6."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import representation_drift, unit_length
from ask_lightning.functional.drift import log_normalizers, softmax_divergence
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sample(seed: int, queries: int = 5, pairs: int = 9, width: int = 4, drift: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    u, current, noise = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (queries, pairs, pairs)
    )
    return unit_length(u), unit_length(current), unit_length(current + drift * noise)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-7)])
def test_agrees_with_reference(dtype, tolerance):
    inputs = sample(0)
    drift = representation_drift(*(x.to(dtype) for x in inputs))
    expected = reference.representation_drift(*(x.numpy() for x in inputs))
    assert drift.shape == ()
    assert drift.dtype == dtype
    assert expected > 0.01
    np.testing.assert_allclose(drift.item(), expected, rtol=0, atol=tolerance)


@PROPERTY
@given(seed=st.integers(0, 10_000), pairs=st.integers(1, 300))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_right_after_a_refresh(dtype, seed, pairs):
    queries, current, _ = (x.to(dtype) for x in sample(seed, pairs=pairs))
    assert representation_drift(queries, current, current.clone()).item() == 0


@PROPERTY
@given(seed=st.integers(0, 10_000), pairs=st.integers(2, 60), drift=st.floats(0, 5))
def test_never_negative(seed, pairs, drift):
    assert representation_drift(*sample(seed, pairs=pairs, drift=drift)).item() >= -1e-15


@PROPERTY
@given(seed=st.integers(0, 10_000), pairs=st.integers(2, 60), drift=st.floats(0, 5), scale=st.floats(0.1, 10))
def test_bounds_the_deviation_of_the_retrieved_knowledge(seed, pairs, drift, scale):
    """Eq. 6: ‖ΔK‖₂ ≤ C √(2 RDM), K(u) = Σ_j p_j U_j with both weightings on the same rows of norm ≤ C."""
    queries, current, stored = sample(seed, pairs=pairs, drift=drift)
    rows = scale * current
    longest = torch.linalg.vector_norm(rows, dim=1).max().item()
    deviations = []
    for query in queries:
        now, before = torch.softmax(current @ query, 0), torch.softmax(stored @ query, 0)
        deviation = torch.linalg.vector_norm((now - before) @ rows).item()
        of_this_query = max(representation_drift(query[None], current, stored).item(), 0.0)
        assert deviation <= longest * (2 * of_this_query) ** 0.5 + 1e-7
        deviations.append(deviation)
    of_all = max(representation_drift(queries, current, stored).item(), 0.0)
    assert np.mean(deviations) <= longest * (2 * of_all) ** 0.5 + 1e-7


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_order_of_queries_and_of_pairs_is_immaterial(seed):
    queries, current, stored = sample(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, base = torch.randperm(5, generator=generator), torch.randperm(9, generator=generator)
    expected = representation_drift(queries, current, stored)
    permuted = representation_drift(queries[batch], current[base], stored[base])
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("block_size", [1, 2, 4, 5, 100])
def test_block_size_is_immaterial(block_size):
    inputs = sample(0)
    torch.testing.assert_close(
        representation_drift(*inputs, block_size=block_size),
        representation_drift(*inputs),
        rtol=1e-14,
        atol=0,
    )


def test_grows_with_the_drift():
    drifts = [representation_drift(*sample(0, drift=drift)).item() for drift in (0.0, 0.1, 0.3, 1.0)]
    assert drifts == sorted(drifts)
    assert len(set(drifts)) == 4


def test_a_base_of_another_shape_is_refused():
    queries, current, stored = sample(0)
    message = (
        r"Arguments `current` and `stored` have to hold the same rows, but got shapes \(9, 4\) and \(8, 4\)\."
    )
    with pytest.raises(ValueError, match=message):
        representation_drift(queries, current, stored[:-1])


def test_gradcheck():
    inputs = [x.requires_grad_() for x in sample(0)]
    assert torch.autograd.gradcheck(lambda *x: representation_drift(*x, block_size=2), inputs)


def test_drift_survives_half_precision():
    generator = torch.Generator().manual_seed(0)
    current = torch.nn.functional.normalize(torch.randn(200, 16, generator=generator), dim=1).bfloat16()
    stored = (current.float() + 0.02 * torch.randn(200, 16, generator=generator)).bfloat16()
    expected = representation_drift(current.double(), current.double(), stored.double())
    assert representation_drift(current, current, stored).item() == pytest.approx(expected.item(), rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drift = representation_drift(current.float(), current.float(), stored.float())
    assert drift.item() == pytest.approx(expected.item(), rel=1e-3)


def test_drift_without_queries():
    with pytest.raises(ValueError, match="`queries` has to hold at least one embedding"):
        representation_drift(torch.ones(0, 3), torch.ones(4, 3), torch.ones(4, 3))


def test_shares_of_blocks_of_rows_add_up():
    """With the normalizers of all rows, as ranks compute it that hold some rows each."""
    generator = torch.Generator().manual_seed(1)
    current, stored = torch.nn.functional.normalize(
        torch.randn(2, 40, 6, generator=generator, dtype=torch.float64), dim=2
    )
    queries = current[::3]
    scores = [
        (queries @ now.T, queries @ before.T)
        for now, before in zip(current.split([0, 7, 33]), stored.split([0, 7, 33]), strict=True)
    ]
    normalizers = torch.stack([log_normalizers(*block) for block in scores]).logsumexp(dim=0)
    shares = [softmax_divergence(*block, normalizers).sum() for block in scores]
    total = torch.stack(shares).sum() / len(queries)
    torch.testing.assert_close(total, representation_drift(queries, current, stored))


@pytest.mark.parametrize("block_size", [0, -1, 2.5])
def test_block_size_out_of_range(block_size):
    with pytest.raises(ValueError, match="`block_size` has to be an integer of at least 1"):
        representation_drift(torch.eye(3), torch.eye(3), torch.eye(3), block_size=block_size)
