"""`NearestNeighborContrastiveLoss` against numpy, and the life of its support set."""

import numpy as np
import pytest
import torch

from ask_lightning.losses import NearestNeighborContrastiveLoss
from tests.helpers.contrast import TEMPERATURE, agreeing, entropy, plain, unit

BATCH, CLIPS = 5, 12


def batches(count: int):
    for seed in range(count):
        ids = torch.randint(CLIPS, (BATCH,), generator=torch.Generator().manual_seed(seed))
        yield *agreeing(BATCH, seed, width=3), ids


def by_hand(audio, text, ids, support, positives) -> tuple[float, dict[str, float]]:
    u, v = unit(audio), unit(text)
    size, total = len(u), 0.0
    nearest = [int(np.argmax([row @ query for row, _ in support])) for query in v]
    neighbors, clips = [support[row][0] for row in nearest], [support[row][1] for row in nearest]
    shared = 0
    for i in range(size):
        texts, audios = [], []
        for j in range(size):
            same = positives == "ids" and ids[i] == ids[j]
            if j == i:
                continue
            shared += nearest[i] == nearest[j]
            if not same:
                audios.append(u[j])
            if not same and nearest[i] != nearest[j] and not (positives == "ids" and clips[j] == ids[i]):
                texts.append(neighbors[j])
        total += entropy(u[i], neighbors[i], texts) + entropy(v[i], u[i], audios)
    terms = {
        "neighbor_similarity": np.mean([row @ query for row, query in zip(neighbors, v, strict=True)]),
        "shared_neighbors": shared / size,
        "own_clip_neighbors": np.mean(np.array(clips) == ids.numpy()),
    }
    return total / size / 2, terms


@pytest.mark.parametrize("positives", ["ids", "diagonal"])
@pytest.mark.parametrize("size", [3, 12])
def test_it_is_the_equation_batch_after_batch(size, positives):
    loss = NearestNeighborContrastiveLoss(TEMPERATURE, size, positives=positives)
    support: list = []
    seen = {"shared_neighbors": 0.0, "own_clip_neighbors": 0.0}
    for audio, text, ids in batches(12):
        value = loss(audio, text, ids=ids).item()
        assert loss.last["queue_fill"] == pytest.approx(len(support) / size)
        if len(support) == size:
            expected, terms = by_hand(audio, text, ids, support, positives)
            assert value == pytest.approx(expected, rel=1e-12)
            for name, term in terms.items():
                assert loss.last[name] == pytest.approx(term)
                seen[name] = seen.get(name, 0.0) + term
        else:
            assert value == pytest.approx(plain(audio, text, ids if positives == "ids" else None), rel=1e-12)
        support = [*support, *zip(unit(text), ids.tolist(), strict=True)][-size:]
    assert seen["shared_neighbors"] > 0
    assert seen["own_clip_neighbors"] > 0


def test_both_encoders_learn_and_the_support_set_has_no_gradient():
    loss = NearestNeighborContrastiveLoss(TEMPERATURE, BATCH)
    first, second = batches(2)

    def second_loss(audio, text):
        loss.reset()
        loss(*first[:2], ids=first[2])
        return loss(audio, text, ids=second[2])

    sides = [side.clone().requires_grad_() for side in second[:2]]
    assert torch.autograd.gradcheck(second_loss, sides)
    second_loss(*sides).backward()
    assert all(side.grad.abs().sum() > 0 for side in sides)


def test_evaluation_neither_reads_nor_writes_the_support_set():
    loss = NearestNeighborContrastiveLoss(TEMPERATURE, BATCH)
    first, second = batches(2)
    loss(*first[:2], ids=first[2])
    before = loss.training_state()["queue"]
    loss.eval()
    assert loss(*second[:2], ids=second[2]).item() == pytest.approx(plain(*second), rel=1e-12)
    assert all(torch.equal(rows, before[name]) for name, rows in loss.training_state()["queue"].items())


def test_without_ids():
    loss = NearestNeighborContrastiveLoss(TEMPERATURE, BATCH, positives="diagonal")
    for audio, text, _ in batches(2):
        loss(audio, text)
    assert set(loss.last) == {"loss", "queue_fill", "neighbor_similarity", "shared_neighbors"}


def test_options():
    loss = NearestNeighborContrastiveLoss(0.2, 7, positives="diagonal", gather=True)
    expected = {"support_size": 7, "temperature": 0.2, "positives": "diagonal", "gather": True}
    assert loss.options == expected
    assert NearestNeighborContrastiveLoss.from_options(expected).options == expected
    with pytest.raises(ValueError, match="`support_size` has to be an integer of at least 1, but got 0"):
        NearestNeighborContrastiveLoss(support_size=0)
