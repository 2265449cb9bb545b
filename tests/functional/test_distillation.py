"""`teacher_targets` against numpy, and its limits."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ask_lightning.functional import nt_xent
from ask_lightning.functional.distillation import teacher_targets
from tests.helpers import reference

ALL = torch.ones(6, dtype=torch.bool)


def unit_rows(seed: int = 0, rows: int = 6, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    audio, text = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(audio, dim=1), torch.nn.functional.normalize(text, dim=1)


def by_hand(audio, text, weight: float, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """A loop over rows and columns."""
    sides = []
    for queries, candidates in ((text, audio), (audio, text)):
        targets = np.zeros((len(queries), len(queries)))
        for i, query in enumerate(queries.numpy()):
            scores = np.array([np.exp(query @ candidate / temperature) for candidate in candidates.numpy()])
            targets[i] = weight * scores / scores.sum()
            targets[i, i] += 1 - weight
        sides.append(targets)
    return sides[0], sides[1]


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_softmax_is_the_equation(weight, temperature):
    audio, text = unit_rows()
    found = teacher_targets(
        audio, text, ALL, distillation_weight=weight, teacher_temperature=temperature, teacher="softmax"
    )
    for side, expected in zip(found, by_hand(audio, text, weight, temperature), strict=True):
        np.testing.assert_allclose(side.numpy(), expected, rtol=1e-12)


def test_transport_is_that_of_pot():
    audio, text = unit_rows()
    t2a, a2t = teacher_targets(
        audio, text, ALL, distillation_weight=1.0, teacher_temperature=0.3, teacher="transport"
    )
    uniform = np.full(6, 1 / 6)
    plan = ot.sinkhorn(uniform, uniform, -(text @ audio.T).numpy(), 0.3, stopThr=1e-14, numItermax=5000)
    np.testing.assert_allclose(t2a.numpy(), 6 * plan, atol=1e-6)
    torch.testing.assert_close(a2t, t2a.T)


@pytest.mark.parametrize("teacher", ["softmax", "transport"])
def test_unknown_clips_have_their_own_pair_only(teacher):
    audio, text = unit_rows()
    known = torch.tensor([True, False, True, True, False, True])
    for side in teacher_targets(audio, text, known, teacher=teacher, teacher_temperature=0.5):
        torch.testing.assert_close(side[~known], torch.eye(6, dtype=torch.float64)[~known])
        torch.testing.assert_close(side[:, ~known], torch.eye(6, dtype=torch.float64)[:, ~known])
    # The others are what they would be without them.
    few = teacher_targets(audio[known], text[known], ALL[known], teacher=teacher, teacher_temperature=0.5)
    for side, alone in zip(
        teacher_targets(audio, text, known, teacher=teacher, teacher_temperature=0.5), few, strict=True
    ):
        torch.testing.assert_close(side[known][:, known], alone, atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 1000), weight=st.floats(0, 1), temperature=st.floats(0.02, 10))
def test_rows_are_distributions(seed, weight, temperature):
    audio, text = unit_rows(seed)
    for side in teacher_targets(
        audio, text, ALL, distillation_weight=weight, teacher_temperature=temperature
    ):
        assert bool((side >= 0).all())
        torch.testing.assert_close(side.sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_flat_teacher_is_label_smoothing():
    audio, text = unit_rows()
    targets, _ = teacher_targets(audio, text, ALL, distillation_weight=0.4, teacher_temperature=1e9)
    similarity = text @ audio.T
    torch.testing.assert_close(
        nt_xent(similarity, 0.2, targets=targets),
        torch.nn.functional.cross_entropy(similarity / 0.2, torch.arange(6), label_smoothing=0.4),
    )


def test_what_leaves_the_denominator_is_no_target():
    audio, text = unit_rows()
    ignore = torch.zeros(6, 6, dtype=torch.bool)
    ignore[0, 1] = ignore[1, 0] = ignore[2, 2] = True
    t2a, a2t = teacher_targets(audio, text, ALL, ignore=ignore)
    assert t2a[0, 1] == t2a[1, 0] == a2t[0, 1] == a2t[1, 0] == 0
    assert t2a[2, 2] > 0.3
    similarity = (text @ audio.T).requires_grad_()
    loss = nt_xent(similarity, 0.1, targets=t2a, ignore=ignore)
    loss.backward()
    assert loss.isfinite()
    assert bool(similarity.grad.isfinite().all())
    assert similarity.grad[0, 1] == 0


def test_soft_targets_are_the_cross_entropy_of_torch():
    audio, text = unit_rows()
    targets, _ = teacher_targets(audio, text, ALL)
    similarity = text @ audio.T
    torch.testing.assert_close(
        nt_xent(similarity, 0.2, targets=targets),
        torch.nn.functional.cross_entropy(similarity / 0.2, targets),
    )
    rows = nt_xent(similarity, 0.2, targets=targets, reduction="none")
    torch.testing.assert_close(rows.mean(), nt_xent(similarity, 0.2, targets=targets))
    one_hot = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        nt_xent(similarity, 0.2, targets=one_hot).item(),
        float(reference.cross_entropy(similarity.numpy() / 0.2).mean()),
    )
