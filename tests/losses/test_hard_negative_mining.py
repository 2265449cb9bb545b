"""`HardNegativeMiningLoss` against numpy, its filter, and what it refuses."""

import numpy as np
import pytest
import torch

from ask_lightning import KnowledgeBase
from ask_lightning.losses import HardNegativeMiningLoss
from tests.helpers.contrast import TEMPERATURE, agreeing, entropy, plain, unit

BATCH = 6


def make_case():
    """A batch of five clips, four of which the base knows, and a base with two captions for each clip."""
    audio, text = agreeing(BATCH, 0)
    ids = torch.tensor([4, 1, 2, 4, 6, 99])
    known_audio, known_text = agreeing(30, 1)
    known_audio = known_audio[torch.arange(30) // 2 * 2]  # one audio for both captions
    base = KnowledgeBase.from_embeddings(known_audio, known_text, ids=torch.arange(30) // 2, num_prototypes=4)
    return audio, text, ids, base


def mined(query, own, stored, clips, clip, *, k, candidates, threshold, once) -> tuple[list, int]:
    """The negatives of one query, and the number of candidates that are filtered."""
    order = sorted(range(len(stored)), key=lambda row: (-(query @ stored[row]), row))[:candidates]
    kept, filtered, seen = [], 0, set()
    for row in order:
        again = once and clips[row] in seen
        seen.add(clips[row])
        if clips[row] == clip or again:
            continue
        if threshold is not None and query @ stored[row] > threshold * own:
            filtered += 1
        elif len(kept) < k:
            kept.append(stored[row])
    return kept, filtered


def by_hand(audio, text, ids, base, *, positives="ids", **options) -> tuple[float, float, float]:
    """The loss, and the mean numbers of mined and of filtered items."""
    u, v = unit(audio), unit(text)
    stored_u, stored_v, clips = base.fine.audio.numpy(), base.fine.text.numpy(), base.ids.tolist()
    total, count, left_out = 0.0, 0, 0
    for i, clip in enumerate(ids.tolist()):
        others = [j for j in range(len(u)) if j != i and not (positives == "ids" and ids[j] == clip)]
        own = u[i] @ v[i]
        texts, filtered = mined(u[i], own, stored_v, clips, clip, once=False, **options)
        audios, also = mined(v[i], own, stored_u, clips, clip, once=True, **options)
        total += entropy(u[i], v[i], [*(v[j] for j in others), *texts])
        total += entropy(v[i], u[i], [*(u[j] for j in others), *audios])
        count += len(texts) + len(audios)
        left_out += filtered + also
    return total / len(u) / 2, count / len(u) / 2, left_out / len(u) / 2


@pytest.mark.parametrize("positives", ["ids", "diagonal"])
@pytest.mark.parametrize("threshold", [None, 0.5, 0.95])
@pytest.mark.parametrize(("k", "candidates"), [(1, 4), (3, 12), (8, 1000)])
def test_it_is_the_equation(k, candidates, threshold, positives):
    audio, text, ids, base = make_case()
    loss = HardNegativeMiningLoss(
        TEMPERATURE,
        k,
        num_candidates=candidates,
        false_negative_threshold=threshold,
        positives=positives,
    )
    value = loss(audio, text, ids=ids, knowledge=base)
    expected, count, filtered = by_hand(
        audio, text, ids, base, k=k, candidates=candidates, threshold=threshold, positives=positives
    )
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert loss.last["mined_negatives"] == pytest.approx(count)
    assert loss.last["filtered_negatives"] == pytest.approx(filtered)
    assert (filtered > 0) == (threshold is not None)


def test_gradients_are_those_of_finite_differences_and_none_reach_the_base():
    audio, text, ids, base = make_case()
    loss = HardNegativeMiningLoss(TEMPERATURE, 3, false_negative_threshold=None)
    sides = [side.clone().requires_grad_() for side in (audio, text)]
    assert torch.autograd.gradcheck(lambda *pair: loss(*pair, ids=ids, knowledge=base), sides)
    assert not base.fine.audio.requires_grad


def test_where_all_is_filtered_it_is_nt_xent():
    audio, _, ids, base = make_case()
    loss = HardNegativeMiningLoss(TEMPERATURE, 3, num_candidates=3)
    value = loss(audio, -audio, ids=ids, knowledge=base)  # pairs score below everything
    assert loss.last["mined_negatives"] == loss.last["mined_similarity"] == 0
    assert loss.last["filtered_negatives"] > 0
    assert value.item() == pytest.approx(plain(audio, -audio, ids), rel=1e-12)


def test_without_knowledge():
    audio, text, ids, _ = make_case()
    loss = HardNegativeMiningLoss(TEMPERATURE, 3)
    with pytest.raises(RuntimeError, match="HardNegativeMiningLoss has no knowledge to look up"):
        loss(audio, text, ids=ids)
    assert loss.eval()(audio, text, ids=ids).item() == pytest.approx(plain(audio, text, ids), rel=1e-12)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_knowledge_in_half_precision(storage):
    audio, text, ids, base = make_case()
    stored = KnowledgeBase.from_embeddings(
        base.fine.audio, base.fine.text, ids=base.ids, num_prototypes=4, storage=storage
    )
    options = {"num_negatives": 3, "temperature": TEMPERATURE, "false_negative_threshold": None}
    exact = HardNegativeMiningLoss(**options)(audio, text, ids=ids, knowledge=base)
    rounded = HardNegativeMiningLoss(**options)(audio.bfloat16(), text.bfloat16(), ids=ids, knowledge=stored)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)


def test_options_and_what_is_refused():
    loss = HardNegativeMiningLoss(0.2, 4, num_candidates=9, false_negative_threshold=np.float32(0.5))
    assert HardNegativeMiningLoss.from_options(loss.options).options == loss.options
    assert type(loss.options["false_negative_threshold"]) is float
    assert loss.needs_ids
    for options, message in (
        ({"num_negatives": 0}, "`num_negatives` has to be an integer of at least 1, but got 0"),
        ({"num_negatives": 5, "num_candidates": 4}, "`num_candidates` has to be an integer of at least 5"),
        ({"false_negative_threshold": 1.2}, r"`false_negative_threshold` has to be in \[0, 1\], but got 1.2"),
    ):
        with pytest.raises(ValueError, match=message):
            HardNegativeMiningLoss(**options)
