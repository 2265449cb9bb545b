"""Code that goes by a model's names of parameters, buffers and submodules does the same with the wrapper."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelPruning
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn

from ask_lightning import ReliabilityOTLoss
from tests.helpers.clients import (
    FrozenClient,
    InlineClient,
    PlainTowers,
    RestlessTowers,
    Towers,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.ranks import on_ranks

CLIENTS = [InlineClient, FrozenClient, RestlessTowers]


@pytest.mark.parametrize("client", CLIENTS)
def test_names_are_the_models(client):
    model = client()
    module = wrap(model)
    for kind in ("parameters", "buffers", "modules", "children"):
        ours, theirs = (list(getattr(each, f"named_{kind}")()) for each in (module, model))
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert all(one is other for (_, one), (_, other) in zip(ours, theirs, strict=True))
    assert set(dict(module.named_parameters())) <= set(module.state_dict()), "the two can be joined"
    assert list(module.children()) == list(model.children())
    assert module.get_submodule("audio_encoder") is model.audio_encoder
    assert module.get_parameter("audio_encoder.weight") is model.audio_encoder.weight


def test_every_part_is_reached():
    module = wrap(RestlessTowers())
    parts = list(module.modules())
    assert parts[0] is module
    assert {id(part) for part in parts} == {id(module), id(module.loss), *map(id, module.model.modules())}
    assert len(parts) == len(set(parts))
    reached = []
    module.apply(reached.append)
    assert set(reached) == set(parts)
    for mode in (False, True):
        module.train(mode)
        assert all(part.training == mode for part in parts)
    module.double()
    assert all(weight.dtype == torch.float64 for weight in module.model.parameters())
    assert module.dtype == module.model.dtype == torch.float64


def test_inside_another_module_every_parameter_is_there():
    model = InlineClient()
    outer = nn.ModuleDict({"ask": wrap(model)})
    assert dict(outer.named_parameters()) == {
        f"ask.{name}": weight for name, weight in model.named_parameters()
    }


def test_loss_is_in_training_mode_again_after_a_validation():
    modes = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            modes.append((pl_module.training, pl_module.loss.training))

    run = make_trainer(max_epochs=2, callbacks=[make_refresh(), Look()])
    run.fit(wrap(RestlessTowers()), make_loader(), held_out())
    assert set(modes) == {(True, True)}


def test_a_callback_that_freezes_by_name_freezes():
    class Freeze(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            for name, weight in pl_module.named_parameters():
                weight.requires_grad_(not name.startswith("audio_encoder"))

    model = PlainTowers()
    before = copy.deepcopy(model)
    run = make_trainer(max_epochs=1, callbacks=[Freeze(), make_refresh()])
    run.fit(wrap(model), make_loader())
    assert torch.equal(model.audio_encoder.weight, before.audio_encoder.weight)
    assert not torch.equal(model.text_encoder.weight, before.text_encoder.weight)


@pytest.mark.parametrize("depth", [1, -1])
def test_summary_is_the_models(depth):
    model = RestlessTowers()
    summary, plain = ModelSummary(wrap(model), max_depth=depth), ModelSummary(model, max_depth=depth)
    assert summary.layer_names == plain.layer_names
    assert summary.total_parameters == plain.total_parameters > 0
    assert summary.param_nums == plain.param_nums


class BackboneTowers(PlainTowers):
    """The audio encoder is what `BackboneFinetuning` asks for."""

    def __init__(self):
        super().__init__()
        self.backbone = self.audio_encoder


@pytest.mark.parametrize("ask", [True, False])
def test_backbone_finetuning(ask):
    def only_text(model):
        return torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)

    class Client(BackboneTowers):
        def configure_optimizers(self):
            return only_text(self)

    groups = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            groups.append([len(group["params"]) for group in trainer.optimizers[0].param_groups])

    model = Client()
    tune = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)
    run = make_trainer(max_epochs=2, callbacks=[tune, Look(), *([make_refresh()] if ask else [])])
    run.fit(wrap(model) if ask else model, make_loader())
    assert groups == [[2], [2, 2]]


def test_finetuning_of_the_whole_module():
    class Whole(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module, train_bn=False)
            self.make_trainable(pl_module.text_encoder)

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

    model = InlineClient()
    wrapped = wrap(model, {"temperature": 0.1})
    run = make_trainer(max_epochs=1, callbacks=[Whole(), make_refresh()])
    run.fit(wrapped, make_loader())
    trained = [name for name, weight in wrapped.named_parameters() if weight.requires_grad]
    assert trained == ["text_encoder.weight", "text_encoder.bias"], "logit_scale is the model's own"


@pytest.mark.parametrize("ask", [True, False])
def test_pruning(ask, tmp_path):
    model = PlainTowers()
    run = make_trainer(
        max_epochs=2,
        callbacks=[ModelPruning("l1_unstructured", amount=0.5), *([make_refresh()] if ask else [])],
    )
    run.fit(wrap(model) if ask else model, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert sorted(stored) == sorted(Towers().state_dict()), "the last pruning is made permanent"
    weights = torch.cat([weight.flatten() for name, weight in stored.items() if "weight" in name])
    assert (weights == 0).float().mean() > 0.3


def test_weights_that_a_tool_watches():
    wandb = pytest.importorskip("wandb")
    seen = {}
    run = wandb.init(mode="disabled")
    hooks = []
    module = wrap(InlineClient())
    for name, weight in module.named_parameters():
        hooks.append(weight.register_hook(lambda grad, name=name: seen.setdefault(name, grad)))
    run.watch(module, log="all")
    make_trainer(max_epochs=1, max_steps=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert set(seen) == {name for name, _ in module.named_parameters() if name != "logit_scale"}
    run.finish()


def test_batch_norm_is_converted_in_the_model():
    module = wrap(RestlessTowers())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert converted is module
    assert isinstance(module.model.norm, nn.SyncBatchNorm)
    assert set(module._modules) == {"model", "loss"}


def test_attributes_registered_on_the_wrapper_are_the_models():
    module = wrap(PlainTowers())
    module.register_buffer("mean", torch.zeros(3))
    module.register_parameter("extra", nn.Parameter(torch.ones(2)))
    assert "mean" in module.state_dict()
    assert "extra" in dict(module.named_parameters())


class IgnoringTowers(PlainTowers):
    """Its unused head is not the business of DDP."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self._ddp_params_and_buffers_to_ignore = ["head.weight", "head.bias"]


def names_under_ddp():
    module = wrap(IgnoringTowers())
    names = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            names.extend(name for name, _ in trainer.model.named_parameters())

    run = make_trainer(
        max_epochs=1,
        max_steps=2,
        devices=2,
        strategy="ddp",
        callbacks=[make_refresh(), Look()],
        use_distributed_sampler=False,
    )
    run.fit(module, make_loader())
    return names


def test_ddp_sees_the_models_names_and_what_it_shall_ignore():
    for names in on_ranks(2, names_under_ddp, grouped=False):
        assert names == [f"module.{name}" for name, _ in IgnoringTowers().named_parameters()]


def test_loss_with_a_shared_part_leaves_its_mode_to_the_model():
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.interaction = nn.Bilinear(2, 2, 1)

    class Shared(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, text, audio):
            return text @ audio.T

    model = Client()
    module = wrap(model, {"interaction": Shared(model.interaction)})
    model.interaction.eval()
    module.loss.training = False
    module._put_loss_into_mode(True)
    assert module.loss.training
    assert not model.interaction.training
    assert isinstance(module.loss, ReliabilityOTLoss)
