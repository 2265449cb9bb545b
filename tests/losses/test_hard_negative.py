"""`HardNegativeLoss` against its equations sample by sample, its limits, and what it refuses."""

import math

import pytest
import torch

from ask_lightning import HardNegativeLoss, NTXentLoss
from ask_lightning.functional import hard_negative_nt_xent
from tests.helpers.pair_cases import CLIPS, mean_of_directions, pairs, roles, similarities

TEMPERATURE = 0.3


def by_hand(audio, text, positives, hardness, positive_weight, positive_prior):
    def row_loss(scores, i):
        wanted, negatives = roles(positives, i)
        count = len(negatives)
        p = sum(math.exp(scores[j] / TEMPERATURE) for j in wanted)
        hard = {j: math.exp(hardness * scores[j] / TEMPERATURE) for j in negatives}
        n = sum(count * hard[j] / sum(hard.values()) * math.exp(scores[j] / TEMPERATURE) for j in negatives)
        if positive_prior > 0:
            n = (n - positive_prior * count * p / len(wanted)) / (1 - positive_prior)
            n = max(n, count * math.exp(-1 / TEMPERATURE))
        return -math.log(p / (positive_weight * p + n))

    return mean_of_directions(audio, text, row_loss)


@pytest.mark.parametrize("positives", ["diagonal", "ids", "same_clip"])
@pytest.mark.parametrize(
    ("hardness", "weight", "prior"),
    [(0.1, 1.0, 0.0), (1.0, 0.3, 0.0), (0.5, 0.0, 0.0), (1.0, 1.0, 0.05), (0.0, 0.5, 0.3)],
)
def test_it_is_the_equation(positives, hardness, weight, prior):
    audio, text = pairs()
    loss = HardNegativeLoss(
        TEMPERATURE, hardness, positive_weight=weight, positive_prior=prior, positives=positives
    )
    expected, sides = by_hand(audio, text, positives, hardness, weight, prior)
    ids = CLIPS if loss.needs_ids else None
    assert loss(audio, text, ids=ids).item() == pytest.approx(expected, rel=1e-11)
    assert loss.last["contrastive_t2a"].item() == pytest.approx(sides["t2a"], rel=1e-11)
    assert loss.last["contrastive_a2t"].item() == pytest.approx(sides["a2t"], rel=1e-11)


def test_the_correction_meets_its_floor_in_some_rows_and_not_in_others():
    """Otherwise the test of the equation would say nothing about one of the two."""
    audio, text = pairs()
    floors = 0
    for scores in similarities(audio, text).values():
        for i in range(len(scores)):
            _, negatives = roles("diagonal", i)
            n = sum(math.exp(scores[i][j] / TEMPERATURE) for j in negatives)
            n -= 0.3 * len(negatives) * math.exp(scores[i][i] / TEMPERATURE)
            floors += n / 0.7 < len(negatives) * math.exp(-1 / TEMPERATURE)
    assert 0 < floors < 2 * len(audio)


@pytest.mark.parametrize("positives", ["diagonal", "ids"])
@pytest.mark.parametrize(("weight", "decoupled"), [(1.0, False), (0.0, True)])
def test_without_hardness_it_is_nt_xent(positives, weight, decoupled):
    audio, text = pairs()
    loss = HardNegativeLoss(TEMPERATURE, 0.0, positive_weight=weight, positives=positives)
    plain = NTXentLoss(TEMPERATURE, positives=positives, decoupled=decoupled)
    torch.testing.assert_close(loss(audio, text, ids=CLIPS), plain(audio, text, ids=CLIPS))
    assert loss.last["hardest_weight"] == pytest.approx(1)


def test_very_hard_negatives_are_the_hardest_alone():
    """N copies of it, so that the weights keep their mean."""
    audio, text = pairs()
    count = len(audio) - 1

    def row_loss(scores, i):
        hardest = max(scores[j] for j in range(len(scores)) if j != i)
        p = math.exp(scores[i] / TEMPERATURE)
        return -math.log(p / (p + count * math.exp(hardest / TEMPERATURE)))

    expected, _ = mean_of_directions(audio, text, row_loss)
    loss = HardNegativeLoss(TEMPERATURE, 500.0)
    assert loss(audio, text).item() == pytest.approx(expected, rel=1e-6)
    assert loss.last["hardest_weight"].item() == pytest.approx(count, rel=1e-6)


def test_the_loss_grows_with_hardness():
    audio, text = pairs()
    values = [HardNegativeLoss(TEMPERATURE, hardness)(audio, text).item() for hardness in (0, 0.1, 0.5, 2)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_a_low_temperature_stays_within_float32(prior):
    similarity = torch.eye(4).mul(2).sub(1).requires_grad_()
    losses = hard_negative_nt_xent(similarity, 0.01, hardness=2.0, positive_prior=prior)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(similarity.grad).all()
    wrong = -similarity.detach()
    assert torch.isfinite(hard_negative_nt_xent(wrong, 0.01, hardness=2.0, positive_prior=prior)).all()


def test_a_batch_of_one_clip_has_no_negatives():
    audio, text = pairs()
    audio.requires_grad_()
    loss = HardNegativeLoss(TEMPERATURE, 0.5, positives="same_clip")
    value = loss(audio, text, ids=torch.zeros(len(audio), dtype=torch.long))
    value.backward()
    assert value == 0
    assert torch.equal(audio.grad, torch.zeros_like(audio))
    assert loss.last["hardest_weight"] == 0


@pytest.mark.parametrize("options", [{}, {"positive_prior": 0.05}, {"positive_weight": 0.0}], ids=str)
@pytest.mark.parametrize("positives", ["ids", "same_clip"])
def test_gradients_are_those_of_finite_differences(positives, options):
    audio, text = pairs()
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)

    def value(audio, text, temperature):
        loss = HardNegativeLoss(lambda: temperature, 0.5, positives=positives, **options)
        return loss(audio, text, ids=CLIPS)

    assert torch.autograd.gradcheck(value, [part.requires_grad_() for part in (audio, text, temperature)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardness": -1.0}, "`hardness` has to be at least 0, but got -1.0"),
        ({"positive_weight": 2.0}, r"`positive_weight` has to be in \[0, 1\], but got 2.0"),
        ({"positive_prior": 1.0}, r"`positive_prior` has to be in \[0, 1\), but got 1.0"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        HardNegativeLoss(**options)
