"""`nt_xent`, Eq. 16."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import nt_xent, pair_targets
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
IDS = torch.tensor([7, 3, 7, 5, 3, 7])
SAME_CLIP = IDS[:, None] == IDS  # the diagonal is true as well


def sample(seed: int, batch: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, batch, generator=generator, dtype=torch.float64) - 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_agrees_with_reference(dtype, tolerance, temperature, masked):
    similarity = sample(0)
    ids, ignore = (IDS.numpy(), SAME_CLIP) if masked else (None, None)
    expected = reference.cross_entropy(similarity.numpy() / temperature, ids)
    options = {"ignore": ignore, "temperature": temperature}
    each = nt_xent(similarity.to(dtype), reduction="none", **options)
    mean = nt_xent(similarity.to(dtype), **options)
    assert each.dtype == mean.dtype == dtype
    assert each.shape == (6,)
    assert mean.shape == ()
    # An absolute tolerance beside the relative one: at τ = 0.01 some losses are all but zero.
    np.testing.assert_allclose(each.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(mean.item(), expected.mean(), rtol=tolerance)


def test_default_temperature():
    assert torch.equal(nt_xent(sample(0)), nt_xent(sample(0), 0.07))


@PROPERTY
@given(batch=st.integers(2, 64), temperature=st.floats(0.01, 10))
def test_equal_similarities_cost_the_log_of_the_batch(batch, temperature):
    assert nt_xent(torch.zeros(batch, batch), temperature).item() == pytest.approx(math.log(batch), rel=1e-6)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_permuting_pairs_keeps_the_loss(seed):
    similarity = sample(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    permuted, ignore = similarity[order][:, order], SAME_CLIP[order][:, order]
    torch.testing.assert_close(nt_xent(permuted), nt_xent(similarity), rtol=1e-14, atol=0)
    expected = nt_xent(similarity, ignore=SAME_CLIP, reduction="none")[order]
    torch.testing.assert_close(
        nt_xent(permuted, ignore=ignore, reduction="none"), expected, rtol=1e-13, atol=1e-14
    )


@PROPERTY
@given(seed=st.integers(0, 10_000), offset=st.floats(-5, 5))
def test_offset_of_a_row_is_immaterial(seed, offset):
    similarity = sample(seed)
    torch.testing.assert_close(nt_xent(similarity + offset), nt_xent(similarity), rtol=1e-12, atol=1e-12)


def test_ignored_entries_change_neither_value_nor_gradient():
    similarity = sample(0).requires_grad_()
    nt_xent(similarity, ignore=SAME_CLIP).backward()
    off_diagonal = SAME_CLIP & ~torch.eye(6, dtype=torch.bool)
    assert torch.equal(
        similarity.grad[off_diagonal], torch.zeros(int(off_diagonal.sum()), dtype=torch.float64)
    )
    assert similarity.grad.isfinite().all()
    changed = similarity.detach().masked_fill(off_diagonal, 100.0)
    assert torch.equal(nt_xent(changed, ignore=SAME_CLIP), nt_xent(similarity.detach(), ignore=SAME_CLIP))


def test_diagonal_is_never_ignored():
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert torch.equal(nt_xent(sample(0), ignore=everything), torch.zeros((), dtype=torch.float64))
    diagonal = torch.eye(6, dtype=torch.bool)
    assert torch.equal(nt_xent(sample(0), ignore=diagonal), nt_xent(sample(0)))
    assert diagonal.equal(torch.eye(6, dtype=torch.bool)), "the caller's mask was changed"


def test_plain_loss_is_torch_cross_entropy_bit_for_bit():
    similarity = sample(0).float()
    expected = F.cross_entropy(similarity / 0.07, torch.arange(6))
    assert torch.equal(nt_xent(similarity, 0.07), expected)
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    assert torch.equal(nt_xent(similarity, 0.07, ignore=nothing), expected)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_temperature_may_be_learned(shape):
    temperature = torch.full(shape, 0.07, requires_grad=True)
    loss = nt_xent(sample(0).float(), temperature)
    assert loss.shape == ()
    assert torch.equal(loss, nt_xent(sample(0).float(), 0.07))
    loss.backward()
    assert temperature.grad.shape == shape
    assert temperature.grad.abs().sum() > 0


@pytest.mark.parametrize("ignore", [None, SAME_CLIP])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, ignore):
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, t: nt_xent(s, t, ignore=ignore, reduction=reduction),
        (sample(0).requires_grad_(), temperature),
    )


def test_pair_targets_are_shared_by_positives_and_smoothed_over_candidates():
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    targets = pair_targets(same, label_smoothing=0.3, dtype=torch.float64)
    expected = torch.tensor([[0.45, 0.1, 0.45], [0.1, 0.8, 0.1], [0.45, 0.1, 0.45]], dtype=torch.float64)
    torch.testing.assert_close(targets, expected)
    nobody = torch.zeros(3, 3, dtype=torch.bool)
    smoothed = pair_targets(nobody, label_smoothing=0.3, ignore=same, dtype=torch.float64)
    expected = torch.tensor([[0.85, 0.15, 0], [0.1, 0.8, 0.1], [0, 0.15, 0.85]], dtype=torch.float64)
    torch.testing.assert_close(smoothed, expected)


def test_decoupled_leaves_targets_out_of_the_denominator():
    similarity = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 0.0], [1.0, 1.0, 1.0]])
    rows = nt_xent(similarity, 1.0, decoupled=True, reduction="none")
    expected = torch.stack(
        [
            similarity[0, [1, 2]].logsumexp(0) - 3,
            similarity[1, [0, 2]].logsumexp(0) - 5,
            similarity[2, [0, 1]].logsumexp(0) - 1,
        ]
    )
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(nt_xent(similarity, 1.0, decoupled=True), expected.mean())


def test_further_columns_are_further_negatives():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ignore = torch.zeros(3, 7, dtype=torch.bool)
    ignore[0, 0] = ignore[0, 5] = ignore[2, 1] = True  # a pair's own entry is never left out
    expected = []
    for row in range(3):
        kept = [column for column in range(7) if column == row or not ignore[row, column]]
        logits = (scores[row] / 0.2).numpy()
        expected.append(np.log(sum(np.exp(logits[kept]))) - logits[row])
    losses = nt_xent(scores, 0.2, ignore=ignore, reduction="none")
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12)
