"""`KnowledgeDistillationLoss` against numpy, its limits, and what it refuses."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ask_lightning import KnowledgeBase, KnowledgeDistillationLoss, ReliabilityOTLoss
from ask_lightning.functional import nt_xent
from tests.helpers import reference

TEMPERATURE = 0.3


def agreeing(rows: int, generator: torch.Generator, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return first, 0.7 * first + 0.7 * second


@pytest.fixture
def case():
    """A batch of eight samples of seven clips, and a base in which clips have two rows and one is missing."""
    generator = torch.Generator().manual_seed(0)
    audio, text = agreeing(8, generator)
    ids = torch.tensor([4, 1, 2, 3, 4, 5, 6, 99])
    base = KnowledgeBase.from_embeddings(
        *agreeing(20, generator), ids=torch.arange(20) // 2, num_prototypes=4
    )
    return audio, text, ids, base


def by_hand(
    audio, text, ids, base, *, weight: float, temperature: float, teacher_temperature: float, same_clip=False
) -> float:
    """The equations, sample by sample."""
    u, v = (reference.unit_length(side.numpy()) for side in (audio, text))
    size = len(ids)
    stored = {}
    for name, rows in (("u", base.fine.audio.numpy()), ("v", base.fine.text.numpy())):
        means = [rows[(base.ids == clip).numpy()].mean(axis=0) for clip in ids]
        stored[name] = [mean / np.linalg.norm(mean) for mean in means]
    known = [bool((base.ids == clip).any()) for clip in ids]
    total = 0.0
    for queries, candidates, q0, c0 in ((v, u, "v", "u"), (u, v, "u", "v")):
        for i in range(size):
            others = [j for j in range(size) if j == i or not (same_clip and ids[i] == ids[j])]
            target = np.zeros(size)
            if known[i]:
                scores = {
                    j: np.exp(stored[q0][i] @ stored[c0][j] / teacher_temperature) for j in others if known[j]
                }
                for j, score in scores.items():
                    target[j] = weight * score / sum(scores.values())
                target[i] += 1 - weight
            else:
                target[i] = 1
            logits = {j: queries[i] @ candidates[j] / temperature for j in others}
            normalizer = np.log(sum(np.exp(logit) for logit in logits.values()))
            total -= sum(target[j] * (logits[j] - normalizer) for j in others)
    return total / size / 2


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
def test_it_is_the_equation(case, weight, positives):
    audio, text, ids, base = case
    loss = KnowledgeDistillationLoss(TEMPERATURE, weight, 0.2, positives=positives)
    expected = by_hand(
        *case, weight=weight, temperature=TEMPERATURE, teacher_temperature=0.2, same_clip=positives == "ids"
    )
    assert loss(audio, text, ids=ids, knowledge=base).item() == pytest.approx(expected, rel=1e-10)


def test_without_weight_it_is_nt_xent(case):
    audio, text, ids, base = case
    loss = KnowledgeDistillationLoss(TEMPERATURE, 0.0)
    similarity = nn.functional.normalize(text, dim=1) @ nn.functional.normalize(audio, dim=1).T
    plain = (nt_xent(similarity, TEMPERATURE) + nt_xent(similarity.T, TEMPERATURE)) / 2
    torch.testing.assert_close(loss(audio, text, ids=ids, knowledge=base), plain)


def test_a_flat_teacher_is_label_smoothing(case):
    audio, text, ids, base = case
    audio, text, ids = audio[:7], text[:7], ids[:7]  # all of them known
    loss = KnowledgeDistillationLoss(TEMPERATURE, 0.4, teacher_temperature=1e9)
    similarity = nn.functional.normalize(text, dim=1) @ nn.functional.normalize(audio, dim=1).T
    smoothed = [
        nn.functional.cross_entropy(scores / TEMPERATURE, torch.arange(7), label_smoothing=0.4)
        for scores in (similarity, similarity.T)
    ]
    torch.testing.assert_close(loss(audio, text, ids=ids, knowledge=base), sum(smoothed) / 2)


def test_gradients_are_those_of_finite_differences(case):
    audio, text, ids, base = case
    loss = KnowledgeDistillationLoss(TEMPERATURE)
    assert torch.autograd.gradcheck(
        lambda *sides: loss(*sides, ids=ids, knowledge=base),
        (audio.clone().requires_grad_(), text.clone().requires_grad_()),
    )


def test_terms_for_the_log(case):
    audio, text, ids, base = case
    loss = KnowledgeDistillationLoss(TEMPERATURE)
    value = loss(audio, text, ids=ids, knowledge=base)
    clips = {"unknown_clips", "known_clips"}
    assert set(loss.last) == {"loss", "contrastive", "target_entropy", "target_diagonal"} | clips
    assert loss.last["loss"] == value
    assert loss.last["unknown_clips"] == 1
    assert loss.last["known_clips"] == len(audio) - 1
    assert 0.3 < loss.last["target_diagonal"] < 1
    assert not any(term.requires_grad for term in loss.last.values())
    plain = KnowledgeDistillationLoss(TEMPERATURE, 0.0)(audio, text, ids=ids, knowledge=base)
    torch.testing.assert_close(loss.last["contrastive"], plain)


def test_a_learnable_temperature_learns(case):
    audio, text, ids, base = case
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    loss = KnowledgeDistillationLoss(lambda: 1 / scale.exp())
    loss(audio, text, ids=ids, knowledge=base).backward()
    assert scale.grad.abs() > 0


def test_half_precision_around_it_and_in_storage(case):
    audio, text, ids, _ = case
    base = KnowledgeBase.from_embeddings(
        audio.float(), text.float(), ids=ids, num_prototypes=2, storage="bfloat16"
    )
    loss = KnowledgeDistillationLoss(TEMPERATURE)
    whole = loss(audio.float(), text.float(), ids=ids, knowledge=base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = loss(audio.float(), text.float(), ids=ids, knowledge=base)
    assert around.dtype == torch.float32
    torch.testing.assert_close(whole, around)


def test_before_the_first_knowledge(case):
    audio, text, ids, _ = case
    loss = KnowledgeDistillationLoss(TEMPERATURE)
    with pytest.raises(RuntimeError, match=r"no knowledge to look up. Add KnowledgeRefreshCallback"):
        loss(audio, text, ids=ids)
    plain = KnowledgeDistillationLoss(TEMPERATURE, 0.0).eval()(audio, text, ids=ids)
    assert loss.eval()(audio, text, ids=ids) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_weight": 1.1}, r"`distillation_weight` has to be in \[0, 1\], but got 1.1"),
        ({"teacher_temperature": 0.0}, r"`teacher_temperature` has to be positive, but got 0"),
        ({"temperature": -1}, r"`temperature` has to be positive, but got -1"),
        ({"teacher": "oracle"}, r"`teacher` has to be one of .*softmax.*transport.*, but got 'oracle'"),
        ({"positives": "all"}, r"`positives` has to be one of"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillationLoss(**options)


def test_ids_are_needed(case):
    audio, text, _, base = case
    with pytest.raises(ValueError, match="`ids` has to be given, because KnowledgeDistillationLoss"):
        KnowledgeDistillationLoss()(audio, text, knowledge=base)


def test_options_go_into_a_file_and_back():
    loss = KnowledgeDistillationLoss(0.15, 0.5, 0.2, teacher="transport", positives="ids")
    again = KnowledgeDistillationLoss.from_options(loss.options)
    assert again.options == loss.options
    assert type(again) is KnowledgeDistillationLoss
    loss.distillation_weight, loss.teacher_temperature = np.float64(0.25), torch.tensor(0.5)  # by a schedule
    assert {type(loss.options[name]) for name in ("distillation_weight", "teacher_temperature")} == {float}
    learned = KnowledgeDistillationLoss(nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(ValueError, match="temperature that a file cannot hold"):
        KnowledgeDistillationLoss.from_options(learned.options)


def test_the_published_loss_takes_the_same_targets(case):
    """Without transport and injection ASK's contrast is NT-Xent, so its targets are the teacher's."""
    audio, text, ids, base = case
    neutral = {"injection_ratio": 0, "ot_factor": 0, "lambda_fine": 0, "lambda_coarse": 0}
    ask = ReliabilityOTLoss(
        3, **neutral, temperature=TEMPERATURE, granularities=("fine",), distillation_weight=0.6
    )
    assert ask.needs_ids
    assert ask.needs_training_clips
    teacher = KnowledgeDistillationLoss(TEMPERATURE, 0.6)
    torch.testing.assert_close(
        ask(audio, text, ids=ids, knowledge=base), teacher(audio, text, ids=ids, knowledge=base)
    )


@pytest.mark.parametrize("make", [KnowledgeDistillationLoss, partial(ReliabilityOTLoss, num_neighbors=3)])
@pytest.mark.parametrize(
    ("option", "value"),
    [("distillation_weight", 0.2), ("teacher_temperature", 0.5), ("teacher", "transport")],
)
def test_options_that_a_schedule_changes_take_effect(case, make, option, value):
    audio, text, ids, base = case
    changed, other = make(distillation_weight=0.7), make(**{"distillation_weight": 0.7, option: value})
    changed(audio, text, ids=ids, knowledge=base)
    setattr(changed, option, value)
    losses = [loss(audio, text, ids=ids, knowledge=base) for loss in (changed, other)]
    assert losses[0] == losses[1] != make(distillation_weight=0.7)(audio, text, ids=ids, knowledge=base)
