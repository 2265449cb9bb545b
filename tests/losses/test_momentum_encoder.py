"""The momentum copy: the moving average, buffers, modes, and a state that goes on."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ask_lightning.losses.momentum_encoder import MomentumEncoder


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).double()


def train(model: nn.Module, seed: int) -> None:
    """Some change of all weights and buffers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.parameters(), *model[1].buffers()]:
            value.add_(torch.randn(value.shape, generator=generator).to(value).abs() * 2)


def test_moving_average_of_parameters_and_copy_of_buffers():
    model, encoder = make_model(), MomentumEncoder(0.9)
    encoder.start(model, 0)
    average = {name: value.clone() for name, value in model.named_parameters()}
    for step in range(1, 6):
        train(model, step)
        follower = encoder.follow(model, step)
        for name, value in model.named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * value.detach()
            torch.testing.assert_close(
                dict(follower.named_parameters())[name], average[name], rtol=1e-13, atol=0
            )
        for name, value in model.named_buffers():
            assert torch.equal(dict(follower.named_buffers())[name], value)
    assert not any(weight.requires_grad for weight in follower.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_it_moves_once_for_each_optimiser_step():
    model, encoder = make_model(), MomentumEncoder(0.5)
    encoder.start(model, 0)
    train(model, 1)
    still = encoder.follow(model, 0)[0].weight.clone()
    first = encoder.follow(model, 1)[0].weight.clone()
    assert not torch.equal(first, still)
    assert torch.equal(encoder.follow(model, 1)[0].weight, first)


def test_training_modes_are_the_models():
    model, encoder = make_model(), MomentumEncoder(0.5)
    encoder.start(model.eval(), 0)
    model.train()
    model[1].eval()
    follower = encoder.follow(model, 0)
    assert [part.training for part in follower] == [True, False, True]


def test_dtype_follows_the_model():
    model, encoder = make_model(), MomentumEncoder(0.5)
    encoder.start(model, 0)
    model.float()
    follower = encoder.follow(model, 1)
    assert {value.dtype for value in follower.parameters()} == {torch.float32}
    assert follower[1].num_batches_tracked.dtype == torch.int64


def test_it_goes_on_from_its_state():
    model, encoder = make_model(), MomentumEncoder(0.9)
    for step in range(3):
        encoder.follow(model, step)
        train(model, step)
    state = copy.deepcopy(encoder.state_dict())
    resumed = MomentumEncoder(0.9)
    resumed.load_state_dict(state)
    assert resumed.state_dict() is state, "before it has a model it keeps what it was given"
    twin = copy.deepcopy(model)
    for step in range(3, 6):
        ours, theirs = resumed.follow(twin, step), encoder.follow(model, step)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
        train(model, step)
        train(twin, step)


def test_state_of_another_model_is_refused():
    encoder = MomentumEncoder(0.9)
    encoder.start(nn.Linear(2, 3), 0)
    other = MomentumEncoder(0.9)
    other.load_state_dict(encoder.state_dict())
    with pytest.raises(ValueError, match=r"of another model: bias, weight differ\. Start a new run"):
        other.start(nn.Linear(3, 4), 0)


def test_no_state_without_a_model():
    encoder = MomentumEncoder(0.9)
    assert encoder.state_dict() == {}
    encoder.start(make_model(), 0)
    encoder.clear()
    assert encoder.state_dict() == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies_are_independent(duplicate):
    model, encoder = make_model(), MomentumEncoder(0.5)
    encoder.start(model, 0)
    twin = duplicate(encoder)
    before = encoder.state_dict()["weights"]["0.weight"].clone()
    train(model, 1)
    moved = twin.follow(model, 1)[0].weight
    assert torch.equal(encoder.state_dict()["weights"]["0.weight"], before)
    torch.testing.assert_close(moved, 0.5 * before + 0.5 * model[0].weight)


def test_half_precision_is_refused():
    with pytest.raises(
        ValueError, match=r"average of weight in torch\.bfloat16 would stand still.*bf16-mixed"
    ):
        MomentumEncoder(0.999).start(nn.Linear(2, 2).bfloat16(), 0)
    frozen = nn.Linear(2, 2).bfloat16().requires_grad_(False)
    MomentumEncoder(0.999).start(nn.Sequential(frozen, nn.Linear(2, 2)), 0)
