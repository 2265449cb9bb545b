"""`TripletLoss` against its equations, torch's own margin losses, its limits, and what it refuses."""

import pytest
import torch
from torch.nn.functional import margin_ranking_loss, multi_margin_loss, normalize

from ask_lightning import TripletLoss
from tests.helpers.pair_cases import CLIPS, pairs, roles, similarities

MARGIN = 0.4


def by_hand(audio, text, negatives, positives) -> dict[str, float]:
    sides = {}
    for name, scores in similarities(audio, text).items():
        total = 0.0
        for i in range(len(scores)):
            _, others = roles(positives, i)
            hinges = [max(0.0, MARGIN + scores[i][j] - scores[i][i]) for j in others]
            total += max(hinges, default=0) if negatives == "hardest" else sum(hinges)
        sides[name] = total / len(scores)
    return sides


@pytest.mark.parametrize("negatives", ["hardest", "all"])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
def test_it_is_the_equation(negatives, positives):
    audio, text = pairs()
    loss = TripletLoss(MARGIN, negatives=negatives, positives=positives)
    sides = by_hand(audio, text, negatives, positives)
    ids = CLIPS if loss.needs_ids else None
    assert loss(audio, text, ids=ids).item() == pytest.approx(sum(sides.values()), rel=1e-12)
    assert loss.last["triplet_t2a"].item() == pytest.approx(sides["t2a"], rel=1e-12)
    assert loss.last["triplet_a2t"].item() == pytest.approx(sides["a2t"], rel=1e-12)


def test_torchs_margin_losses_are_the_same():
    audio, text = pairs()
    similarity = normalize(text, dim=1) @ normalize(audio, dim=1).T
    size = len(similarity)
    pair = torch.arange(size)
    # torch divides the sum over the other classes by the number of classes.
    both = [multi_margin_loss(scores, pair, margin=MARGIN) * size for scores in (similarity, similarity.T)]
    torch.testing.assert_close(TripletLoss(MARGIN, negatives="all")(audio, text), sum(both))
    others = similarity.masked_fill(torch.eye(size, dtype=torch.bool), -2)
    both = [
        margin_ranking_loss(
            similarity.diagonal(), others.amax(dim=axis), torch.ones(size, dtype=torch.double), margin=MARGIN
        )
        for axis in (0, 1)
    ]
    torch.testing.assert_close(TripletLoss(MARGIN)(audio, text), sum(both))


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_pairs_beyond_the_margin_count_nothing(negatives):
    unit = torch.eye(4)
    loss = TripletLoss(0.9, negatives=negatives)
    assert loss(unit, unit) == 0
    assert loss.last["active_triplets"] == 0
    wrong = unit.roll(1, dims=0)  # each text is that of the next clip
    loss(unit, wrong)
    # With all negatives the similarities of 0 are violations, too: the pair itself has 0.
    assert loss.last["active_triplets"] == 1


def test_a_margin_of_0_counts_ranks_that_are_wrong():
    audio, text = pairs()
    loss = TripletLoss(0.0, negatives="all")
    loss(audio, text)
    wrong = sum(
        int((scores[i] > scores[i][i]).sum())
        for scores in similarities(audio, text).values()
        for i in range(len(scores))
    )
    assert wrong > 0
    assert loss.last["active_triplets"].item() == pytest.approx(wrong / (2 * len(audio) * (len(audio) - 1)))


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_samples_of_the_same_clip_make_no_triplets(negatives):
    audio, text = pairs()
    clips = torch.zeros(len(audio), dtype=torch.long)
    clips[-1] = 1  # only pairs with the last one are of different clips
    loss = TripletLoss(3.0, negatives=negatives, positives="ids")
    loss(audio, text, ids=clips)
    assert loss.last["active_triplets"] == 1, "all are within a margin that is larger than any difference"


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_a_single_pair_of_a_rank_makes_no_triplets(negatives, monkeypatch):
    monkeypatch.setattr(TripletLoss, "min_pairs", 1)  # as on several ranks
    loss = TripletLoss(negatives=negatives)
    assert loss(torch.eye(1, 4), torch.eye(1, 4)) == 0
    assert loss.last["active_triplets"] == 0


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_a_batch_of_one_clip_has_no_negatives(negatives):
    audio, text = pairs()
    audio.requires_grad_()
    loss = TripletLoss(2.0, negatives=negatives, positives="ids")
    value = loss(audio, text, ids=torch.zeros(len(audio), dtype=torch.long))
    value.backward()
    assert value == 0
    assert torch.equal(audio.grad, torch.zeros_like(audio))


@pytest.mark.parametrize("negatives", ["hardest", "all"])
def test_gradients_are_those_of_finite_differences(negatives):
    loss = TripletLoss(MARGIN, negatives=negatives, positives="ids")
    inputs = [side.requires_grad_() for side in pairs()]
    assert torch.autograd.gradcheck(lambda audio, text: loss(audio, text, ids=CLIPS), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": -0.1}, "`margin` has to be at least 0, but got -0.1"),
        (
            {"negatives": "semi-hard"},
            r"`negatives` has to be one of \('hardest', 'all'\), but got 'semi-",
        ),
        ({"positives": "same_clip"}, r"`positives` has to be one of \('diagonal', 'ids'\)"),
    ],
)
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TripletLoss(**options)


def test_it_has_no_temperature_among_its_options():
    options = TripletLoss(0.3, negatives="all").options
    assert options == {"margin": 0.3, "negatives": "all", "positives": "diagonal", "gather": False}
    assert TripletLoss.from_options(options).options == options
