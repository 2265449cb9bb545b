"""`MomentumContrastLoss` against numpy, its keys and its queue."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ask_lightning.losses import MomentumContrastLoss
from tests.helpers.contrast import TEMPERATURE, agreeing, entropy, plain, unit

BATCH, CLIPS, WIDTH = 4, 9, 5


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio = nn.Linear(WIDTH, 6).double()
        self.text = nn.Linear(WIDTH, 6).double()

    def forward(self, audio, text):
        return self.audio(audio), self.text(text)


def batches(count: int):
    for seed in range(count):
        ids = torch.randint(CLIPS, (BATCH,), generator=torch.Generator().manual_seed(seed))
        yield *agreeing(BATCH, seed), ids


def by_hand(queries, keys, ids, queue, positives) -> float:
    (u, v), (u_keys, v_keys) = queries, keys
    total = 0.0
    for i, clip in enumerate(ids.tolist()):

        def is_negative(other, clip=clip):
            return positives == "diagonal" or other != clip

        others = [j for j in range(len(u)) if j != i and is_negative(ids[j].item())]
        queued = [row for row in queue if is_negative(row[2])]
        total += entropy(u[i], v_keys[i], [*(v_keys[j] for j in others), *(row[1] for row in queued)])
        total += entropy(v[i], u_keys[i], [*(u_keys[j] for j in others), *(row[0] for row in queued)])
    return total / len(u) / 2


@pytest.mark.parametrize("positives", ["ids", "diagonal"])
@pytest.mark.parametrize(("queue_size", "slope"), [(6, 0.0), (64, 0.0), (64, 0.05)])
def test_it_is_the_equation_step_after_step(queue_size, slope, positives):
    """Also where a schedule raises the momentum."""
    model = Towers()
    loss = MomentumContrastLoss(TEMPERATURE, queue_size, momentum=0.6, positives=positives)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    follower, queue = copy.deepcopy(model), []
    for step, (audio, text, ids) in enumerate(batches(6)):
        embeddings = model(audio, text)
        if slope:
            loss.momentum = 0.6 + slope * (step - 1)  # of the optimiser step before
        loss.make_keys(model, lambda encoder, audio=audio, text=text: encoder(audio, text), step)
        value = loss(*embeddings, ids=ids)
        keys = tuple(unit(side) for side in follower(audio, text))
        expected = by_hand([unit(side) for side in embeddings], keys, ids, queue, positives)
        assert value.item() == pytest.approx(expected, rel=1e-11)
        assert loss.last["queue_fill"] == pytest.approx(len(queue) / queue_size)
        similarity = np.mean([np.sum(unit(a) * b, axis=1) for a, b in zip(embeddings, keys, strict=True)])
        assert loss.last["key_similarity"] == pytest.approx(similarity)
        queue = [*queue, *zip(*keys, ids.tolist(), strict=True)][-queue_size:]
        optimizer.zero_grad()
        value.backward()
        assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(follower.parameters(), model.parameters(), strict=True):
                momentum = 0.6 + slope * step
                ours.mul_(momentum).add_((1 - momentum) * theirs)


def test_evaluation_is_nt_xent_and_leaves_no_trace():
    loss, model = MomentumContrastLoss(TEMPERATURE, 8), Towers()
    first, second = batches(2)
    loss.make_keys(model, lambda encoder: encoder(*first[:2]), 0)
    loss(*model(*first[:2]), ids=first[2])
    before = loss.training_state()
    loss.eval()
    embeddings = model(*second[:2])
    assert loss(*embeddings, ids=second[2]).item() == pytest.approx(plain(*embeddings, second[2]), rel=1e-12)
    after = loss.training_state()
    assert all(torch.equal(after["queue"][name], rows) for name, rows in before["queue"].items())


def test_keys_have_no_gradient_and_serve_one_batch():
    loss, model = MomentumContrastLoss(TEMPERATURE, 8), Towers()
    audio, text, ids = next(batches(1))
    embeddings = [side.detach() for side in model(audio, text)]
    loss.make_keys(model, lambda encoder: encoder(audio, text), 0)
    loss(*embeddings, ids=ids)
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(rows.requires_grad for rows in loss.training_state()["queue"].values())
    with pytest.raises(RuntimeError, match=r"has no keys of this batch\. Wrap the model: ASKModule"):
        loss(*embeddings, ids=ids)
    loss.make_keys(model, lambda encoder: encoder(audio[:3], text[:3]), 0)
    with pytest.raises(ValueError, match=r"of its embeddings, \(4, 6\), but got \(3, 6\) and \(3, 6\)"):
        loss(*embeddings, ids=ids)


def test_the_copy_is_nobodys_parameter():
    loss, model = MomentumContrastLoss(queue_size=8), Towers()
    loss.start(model, 0)
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    assert not loss.state_dict()
    assert len(list(loss.modules())) == 1


def test_options():
    loss = MomentumContrastLoss(0.1, 32, momentum=0.9, positives="diagonal", gather=True)
    assert loss.options == {
        "queue_size": 32,
        "temperature": 0.1,
        "momentum": 0.9,
        "positives": "diagonal",
        "gather": True,
    }
    assert MomentumContrastLoss.from_options(loss.options).options == loss.options
    for options, message in (
        ({"queue_size": 0}, "`queue_size` has to be an integer of at least 1, but got 0"),
        ({"momentum": 1.0}, r"`momentum` has to be in \[0, 1\), but got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            MomentumContrastLoss(**options)
