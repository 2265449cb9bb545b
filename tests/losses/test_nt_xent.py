"""`NTXentLoss` against its equations sample by sample, its limits, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from ask_lightning import KnowledgeDistillationLoss, NTXentLoss
from tests.helpers.pair_cases import CLIPS, mean_of_directions, pairs, roles

TEMPERATURE = 0.3


def by_hand(audio, text, positives="diagonal", smoothing=0.0, decoupled=False):
    def row_loss(scores, i):
        wanted, negatives = roles(positives, i)
        candidates = wanted + negatives
        logits = scores / TEMPERATURE
        below = math.log(sum(math.exp(logits[j]) for j in (negatives if decoupled else candidates)))
        loss = 0.0
        for j in candidates:
            target = (1 - smoothing) * (j in wanted) / len(wanted) + smoothing / len(candidates)
            loss -= target * (logits[j] - below)
        return loss

    return mean_of_directions(audio, text, row_loss)


@pytest.mark.parametrize("positives", ["diagonal", "ids", "same_clip"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"label_smoothing": 1.0}, {"decoupled": True}], ids=str
)
def test_it_is_the_equation(positives, options):
    audio, text = pairs()
    loss = NTXentLoss(TEMPERATURE, positives=positives, **options)
    expected, sides = by_hand(
        audio, text, positives, options.get("label_smoothing", 0.0), options.get("decoupled", False)
    )
    ids = CLIPS if loss.needs_ids else None
    assert loss.needs_ids == (positives != "diagonal")
    assert loss(audio, text, ids=ids).item() == pytest.approx(expected, rel=1e-12)
    assert loss.last["contrastive_t2a"].item() == pytest.approx(sides["t2a"], rel=1e-12)
    assert loss.last["contrastive_a2t"].item() == pytest.approx(sides["a2t"], rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_smoothing_is_torchs(smoothing):
    audio, text = pairs()
    similarity = normalize(text, dim=1) @ normalize(audio, dim=1).T
    expected = [
        cross_entropy(scores / TEMPERATURE, torch.arange(len(scores)), label_smoothing=smoothing)
        for scores in (similarity, similarity.T)
    ]
    loss = NTXentLoss(TEMPERATURE, label_smoothing=smoothing)
    torch.testing.assert_close(loss(audio, text), sum(expected) / 2)


def test_smoothing_is_a_teacher_that_knows_nothing():
    """The same spread of the targets where samples of the same clip leave the denominator."""
    from ask_lightning import KnowledgeBase

    audio, text = pairs()
    teacher = KnowledgeDistillationLoss(TEMPERATURE, 0.4, teacher_temperature=1e9, positives="ids")
    base = KnowledgeBase.from_embeddings(audio, text, ids=CLIPS, num_prototypes=2)
    smoothed = NTXentLoss(TEMPERATURE, label_smoothing=0.4, positives="ids")
    torch.testing.assert_close(
        smoothed(audio, text, ids=CLIPS), teacher(audio, text, ids=CLIPS, knowledge=base)
    )


def test_clips_with_one_sample_each_make_all_kinds_of_positives_the_same():
    audio, text = pairs()
    ids = torch.arange(len(audio))
    values = [
        NTXentLoss(TEMPERATURE, positives=kind)(audio, text, ids=ids)
        for kind in NTXentLoss.kinds_of_positives
    ]
    assert len(values) == 3
    for value in values:
        torch.testing.assert_close(value, values[0])


def test_decoupled_is_less_by_the_log_of_what_the_pair_adds():
    """log(1 + p / n), sample by sample: the pair's part of the denominator."""
    audio, text = pairs()
    _, coupled = by_hand(audio, text)
    _, decoupled = by_hand(audio, text, decoupled=True)
    _, gap = mean_of_directions(
        audio,
        text,
        lambda scores, i: math.log1p(
            math.exp(scores[i] / TEMPERATURE) / np.exp(np.delete(scores, i) / TEMPERATURE).sum()
        ),
    )
    for direction in gap:
        assert coupled[direction] - decoupled[direction] == pytest.approx(gap[direction])


def test_a_batch_of_one_clip_has_no_negatives_to_be_decoupled_from():
    audio, text = pairs()
    audio.requires_grad_()
    loss = NTXentLoss(TEMPERATURE, positives="same_clip", decoupled=True)
    value = loss(audio, text, ids=torch.zeros(len(audio), dtype=torch.long))
    value.backward()
    assert value == 0
    assert torch.equal(audio.grad, torch.zeros_like(audio))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"decoupled": True}], ids=str)
@pytest.mark.parametrize("positives", ["ids", "same_clip"])
def test_gradients_are_those_of_finite_differences(positives, options):
    audio, text = pairs()
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64)

    def value(audio, text, temperature):
        return NTXentLoss(lambda: temperature, positives=positives, **options)(audio, text, ids=CLIPS)

    inputs = [side.requires_grad_() for side in (audio, text, temperature)]
    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, r"`label_smoothing` has to be in \[0, 1\], but got 1.1"),
        ({"label_smoothing": 0.1, "decoupled": True}, "`label_smoothing` has to be 0 with `decoupled=True`"),
        ({"positives": "clip"}, r"`positives` has to be one of \('diagonal', 'ids', 'same_clip'\)"),
        ({"temperature": 0}, "`temperature` has to be positive, but got 0.0"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        NTXentLoss(**options)


def test_ids_are_asked_for():
    with pytest.raises(ValueError, match="`ids` has to be given, because NTXentLoss with these options"):
        NTXentLoss(positives="same_clip")(*pairs())


def test_several_positives_are_refused_by_losses_that_do_not_have_them():
    with pytest.raises(
        ValueError, match=r"`positives` has to be one of \('diagonal', 'ids'\), but got 'same"
    ):
        KnowledgeDistillationLoss(positives="same_clip")
