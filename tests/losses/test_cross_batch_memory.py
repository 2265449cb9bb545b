"""`CrossBatchMemoryLoss` against numpy, its warm-up, and what it remembers."""

import numpy as np
import pytest
import torch

from ask_lightning import ASKModule
from ask_lightning.losses import CrossBatchMemoryLoss
from tests.helpers.clients import PlainTowers
from tests.helpers.contrast import TEMPERATURE, agreeing, entropy, plain, unit

BATCH, CLIPS = 4, 9


def batches(count: int):
    """Batches in which clips appear several times, also in one."""
    for seed in range(count):
        ids = torch.randint(CLIPS, (BATCH,), generator=torch.Generator().manual_seed(seed))
        yield *agreeing(BATCH, seed), ids


def by_hand(audio, text, ids, memory, positives) -> tuple[float, float]:
    """The loss of one batch, and the mean number of remembered pairs that are left out."""
    u, v = unit(audio), unit(text)
    total, left_out = 0.0, 0
    for i, clip in enumerate(ids.tolist()):

        def is_negative(other, clip=clip):
            return positives == "diagonal" or other != clip

        others = [j for j in range(len(u)) if j != i and is_negative(ids[j].item())]
        remembered = [row for row in memory if is_negative(row[2])]
        left_out += len(memory) - len(remembered)
        total += entropy(u[i], v[i], [*(v[j] for j in others), *(row[1] for row in remembered)])
        total += entropy(v[i], u[i], [*(u[j] for j in others), *(row[0] for row in remembered)])
    return total / len(u) / 2, left_out / len(u)


@pytest.mark.parametrize("positives", ["ids", "diagonal"])
@pytest.mark.parametrize(("memory_size", "start_step"), [(6, 0), (64, 0), (10, 3), (2, 1)])
def test_it_is_the_equation_batch_after_batch(memory_size, start_step, positives):
    loss = CrossBatchMemoryLoss(TEMPERATURE, memory_size, start_step=start_step, positives=positives)
    memory: list = []
    for step, (audio, text, ids) in enumerate(batches(7)):
        audio.requires_grad_()
        value = loss(audio, text, ids=ids)
        expected, left_out = by_hand(audio, text, ids, memory, positives)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert loss.last["same_clip_in_queue"] == pytest.approx(left_out)
        assert loss.last["queue_fill"] == pytest.approx(len(memory) / memory_size)
        value.backward()
        if step >= start_step:
            memory += zip(unit(audio), unit(text), ids.tolist(), strict=True)
            memory = memory[-memory_size:]
    assert memory


def test_during_the_warm_up_it_is_nt_xent():
    loss = CrossBatchMemoryLoss(TEMPERATURE, 16, start_step=2)
    for step, (audio, text, ids) in enumerate(batches(4)):
        value = loss(audio, text, ids=ids).item()
        assert (value == pytest.approx(plain(audio, text, ids), rel=1e-12)) == (step < 3)


def test_evaluation_neither_reads_nor_writes_the_memory():
    loss = CrossBatchMemoryLoss(TEMPERATURE, 16, start_step=0)
    first, second, third = batches(3)
    loss(*first[:2], ids=first[2])
    before = loss.training_state()
    loss.eval()
    assert loss(*second[:2], ids=second[2]).item() == pytest.approx(plain(*second), rel=1e-12)
    after = loss.training_state()
    assert after["num_batches"] == before["num_batches"] == 1
    assert all(torch.equal(after["queue"][name], rows) for name, rows in before["queue"].items())
    loss.train()
    value = loss(*third[:2], ids=third[2]).item()
    memory = list(zip(unit(first[0]), unit(first[1]), first[2].tolist(), strict=True))
    assert value == pytest.approx(by_hand(*third, memory, "ids")[0], rel=1e-12)


def test_gradients_are_those_of_finite_differences():
    first, second = batches(2)

    def second_loss(audio, text):
        loss = CrossBatchMemoryLoss(TEMPERATURE, 16, start_step=0)
        loss(*first[:2], ids=first[2])
        return loss(audio, text, ids=second[2])

    sides = [side.clone().requires_grad_() for side in second[:2]]
    assert torch.autograd.gradcheck(second_loss, sides)


def test_without_ids():
    loss = CrossBatchMemoryLoss(TEMPERATURE, 16, start_step=0, positives="diagonal")
    assert not loss.needs_ids
    (first_audio, first_text, _), (audio, text, ids) = batches(2)
    loss(first_audio, first_text)
    memory = [(u, v, -1) for u, v in zip(unit(first_audio), unit(first_text), strict=True)]
    assert loss(audio, text).item() == pytest.approx(by_hand(audio, text, ids, memory, "diagonal")[0])


def test_state_goes_on_and_reset_forgets():
    loss = CrossBatchMemoryLoss(TEMPERATURE, 10, start_step=1)
    *begun, last = batches(5)
    for audio, text, ids in begun:
        loss(audio, text, ids=ids)
    resumed = CrossBatchMemoryLoss.from_options(loss.options)
    assert resumed.options == loss.options == {
        "memory_size": 10,
        "temperature": TEMPERATURE,
        "start_step": 1,
        "positives": "ids",
        "gather": False,
    }  # fmt: skip
    resumed.load_training_state(loss.training_state())
    again, whole = (each(*last[:2], ids=last[2]) for each in (resumed, loss))
    assert torch.equal(again, whole)
    resumed.reset()
    assert resumed(*last[:2], ids=last[2]).item() == pytest.approx(plain(*last), rel=1e-12)
    assert resumed.training_state()["queue"] == {}, "the warm-up starts again"


def test_embeddings_in_bfloat16_are_computed_with_in_float32():
    loss = CrossBatchMemoryLoss(TEMPERATURE, 16, start_step=0)
    for audio, text, ids in batches(2):
        value = loss(audio.bfloat16(), text.bfloat16(), ids=ids)
    assert value.dtype == torch.float32
    assert loss.training_state()["queue"]["audio"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, r"`memory_size` has to be an integer of at least 1, but got 0"),
        ({"start_step": -1}, r"`start_step` has to be an integer of at least 0, but got -1"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrossBatchMemoryLoss(**options)


def test_ids_are_asked_for():
    with pytest.raises(ValueError, match="CrossBatchMemoryLoss with these options compares clips"):
        ASKModule(PlainTowers(), CrossBatchMemoryLoss())
    assert np.isfinite(CrossBatchMemoryLoss()(*agreeing(3, 0), ids=range(3)).item())
