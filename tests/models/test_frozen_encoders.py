"""`freeze_audio` and `freeze_text`: a frozen encoder is one function of its input, and its head learns."""

import copy

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.models import ResNet38BERT
from tests.helpers.clients import make_trainer
from tests.helpers.retrievers import MODELS, Recordings, batch_for

pytest.importorskip("transformers")
pytest.importorskip("torchaudio")

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
SIDES = ("audio", "text")


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def fit(model) -> Trainer:
    loss = ReliabilityOTLoss(num_neighbors=3, temperature=0.5)
    trainer = make_trainer(max_epochs=2, callbacks=[KnowledgeRefreshCallback(T=1, num_prototypes=3)])
    loader = DataLoader(Recordings(model.resample.from_rate), 4)
    trainer.fit(ASKModule(model, loss), loader, loader)
    return trainer


@every_model
@pytest.mark.parametrize("side", SIDES)
def test_a_frozen_encoder_keeps_weights_and_statistics_while_its_head_learns(make, side):
    torch.manual_seed(0)
    model = make(**{f"freeze_{side}": True}, learning_rate=1e-2)
    encoders = dict(zip(SIDES, model.encoders, strict=True))
    frozen = encoders.pop(side)
    (trained,) = encoders.values()
    before = state(model)
    frozen_before, trained_before = state(frozen), state(trained)
    fit(model)
    assert not changed(frozen, frozen_before)  # batch norm's running statistics are in there, too
    assert changed(trained, trained_before)
    heads = {name for name in changed(model, before) if "head" in name or "projection" in name}
    assert any(side in name for name in heads)


@every_model
def test_frozen_encoders_stay_in_evaluation_mode(make):
    model = make(freeze_audio=True)
    frozen, trained = model.encoders
    for _ in range(2):
        assert not any(module.training for module in frozen.modules())
        assert trained.training
        wrapper = ASKModule(model, ReliabilityOTLoss())
        wrapper.eval()
        assert not trained.training
        wrapper.train()
    model = make(freeze_audio=True, freeze_text=True).train()
    batch = batch_for(model, seconds=1.0)
    with torch.no_grad():
        # Neither dropout nor SpecAugment: the heads have none.
        assert torch.equal(model.encode_text(batch), model.encode_text(batch))
        assert torch.equal(model.encode_audio(batch), model.encode_audio(batch))


@every_model
def test_the_optimizer_has_the_other_weights_only(make):
    model = make(freeze_audio=True, freeze_text=True)
    (group,) = model.configure_optimizers()["optimizer"].param_groups
    inside = {id(weight) for encoder in model.encoders for weight in encoder.parameters()}
    assert group["params"]
    assert not [weight for weight in group["params"] if id(weight) in inside]
    loss = model.loss(*(encode(batch_for(model)) for encode in (model.encode_audio, model.encode_text)))
    loss.backward()
    assert all(weight.grad is not None for weight in group["params"])


@every_model
def test_nothing_is_frozen_unless_asked_for(make):
    model = make()
    assert model.frozen_encoders == []
    assert all(encoder.training for encoder in model.encoders)


def test_checkpoints_and_copies_remember(tmp_path):
    model = MODELS["resnet38_bert"](freeze_text=True)
    fit(model).save_checkpoint(tmp_path / "one.ckpt")
    loaded = ResNet38BERT.load_from_checkpoint(tmp_path / "one.ckpt")
    for one in (loaded, copy.deepcopy(model)):
        one.train()
        assert [encoder.training for encoder in one.encoders] == [True, False]
        assert not any(weight.requires_grad for weight in one.text_encoder.parameters())
