"""The model's hooks, loops, logs and callbacks are its own under the wrapper."""

import inspect

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
)
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch import nn

import ask_lightning.hooks
from ask_lightning import ASKModule, NTXentLoss, ReliabilityOTLoss
from tests.helpers.clients import (
    CriterionClient,
    FrozenClient,
    InlineClient,
    MemoryLogger,
    PlainTowers,
    RestlessTowers,
    Towers,
    Watcher,
    assert_same_weights,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    own_metrics,
    static_knowledge,
    wrap,
)

CALLED_BY_NAME = [
    "validation_step",
    "test_step",
    "predict_step",
    "configure_optimizers",
    "configure_callbacks",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "backward",
    "training_step",
]
NOT_RECORDED = {
    # Loaders are given to the trainer here.
    *("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"),
    # Abandoned by Lightning in favour of configure_model.
    "configure_sharded_model",
}


class Everything(PlainTowers):
    """Overrides every hook that Lightning has and notes each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    def predict_step(self, batch, batch_idx):
        return self.encode_audio(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def _noting(name, function):
    def noted(self, *args, **kwargs):
        self.calls.append(name)
        return function(self, *args, **kwargs)

    # Lightning reads signatures to decide what to pass.
    noted.__signature__ = inspect.signature(function)
    return noted


HOOKS = sorted(
    {
        name
        for base in (ModelHooks, DataHooks, CheckpointHooks)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    - NOT_RECORDED
    | set(CALLED_BY_NAME)
)
for _name in HOOKS:
    setattr(Everything, _name, _noting(_name, getattr(Everything, _name)))


def test_every_hook_is_called_as_often_and_in_the_same_order(tmp_path):
    def calls(ask: bool) -> list[str]:
        pl.seed_everything(0, verbose=False)
        model = Everything()
        module = wrap(model) if ask else model
        if ask:
            module.loss.knowledge = static_knowledge(model)
        run = make_trainer(max_epochs=2, gradient_clip_val=0.5, num_sanity_val_steps=1)
        run.fit(module, make_loader(), held_out())
        run.validate(module, held_out(), verbose=False)
        run.test(module, held_out(), verbose=False)
        predictions = run.predict(module, held_out())
        assert [prediction.shape for prediction in predictions] == [(8, 8), (8, 8)]
        path = tmp_path / f"{ask}.ckpt"
        run.save_checkpoint(path)
        again = make_trainer(max_epochs=3)
        again.fit(module, make_loader(), held_out(), ckpt_path=path)
        return model.calls

    plain = calls(ask=False)
    assert calls(ask=True) == plain
    never = set(HOOKS) - set(plain)
    assert not never, f"the test's run does not reach {never}"


def test_hooks_that_the_model_has_not_stay_lightnings():
    """Lightning decides by what is overridden how it trains."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    module, model = wrap(PlainTowers()), PlainTowers()
    own = {"training_step", "setup", "on_train_start", "on_after_backward", "on_train_epoch_end"}
    own |= {"on_save_checkpoint", "on_load_checkpoint"}
    for name in set(HOOKS) - own:
        assert is_overridden(name, module) == is_overridden(name, model), name


def test_method_that_shares_its_name_with_a_hook_is_not_taken_for_it(monkeypatch):
    said = []
    monkeypatch.setattr(ask_lightning.hooks, "rank_zero_info", said.append)
    module = wrap(InlineClient())
    assert said == [
        "InlineClient.lr_scheduler_step(batch_idx) shares its name with a Lightning hook, but cannot take "
        "the hook's arguments; it stays the model's own."
    ]
    assert "lr_scheduler_step" not in vars(module)


def test_a_hook_of_the_wrapper_leaves_a_method_with_other_arguments_alone():
    class Client(PlainTowers):
        def on_train_epoch_end(self, outputs):
            raise AssertionError("this is the model's own")

    make_trainer(max_epochs=1).fit(ASKModule(Client(), NTXentLoss()), make_loader())


def loops(module, **settings):
    run = make_trainer(**settings)
    validated = run.validate(module, held_out(), verbose=False)
    tested = run.test(module, held_out(), verbose=False)
    predicted = run.predict(module, held_out())
    return validated, tested, predicted


@pytest.mark.parametrize("with_callback", [False, True])
def test_validate_test_and_predict(with_callback):
    model = InlineClient()
    module = wrap(model)
    plain = loops(model)
    ours = loops(module, callbacks=[make_refresh()] if with_callback else [])
    assert ours[:2] == plain[:2]
    assert all(torch.equal(one, other) for one, other in zip(ours[2], plain[2], strict=True))
    assert module.loss.knowledge is None


def test_forward_and_default_predict_step():
    class Client(PlainTowers):
        def forward(self, batch):
            return self.encode_text(batch)

    model = Client()
    batch = next(iter(make_loader()))
    module = wrap(model)
    assert torch.equal(module(batch), model(batch))
    predicted = torch.cat(make_trainer().predict(module, held_out()))
    assert torch.equal(predicted, torch.cat(make_trainer().predict(model, held_out())))


@pytest.mark.parametrize("override", [False, True])
def test_gradient_clipping(override):
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.moved, self.asked = [], 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def on_train_batch_start(self, batch, batch_idx):
            self.before = nn.utils.parameters_to_vector(self.parameters()).detach()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            after = nn.utils.parameters_to_vector(self.parameters()).detach()
            self.moved.append((after - self.before).norm().item())

    class Clipping(Client):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            self.asked += 1
            self.clip_gradients(optimizer, 0.05, "norm")

    pl.seed_everything(0, verbose=False)
    model = (Clipping if override else Client)()
    clip = None if override else 0.1
    make_trainer(max_epochs=1, gradient_clip_val=clip, callbacks=[make_refresh()]).fit(
        wrap(model), make_loader()
    )
    assert model.moved == pytest.approx([0.05 if override else 0.1] * 6, rel=1e-3)
    assert model.asked == (6 if override else 0)


def test_accumulate_grad_batches_and_val_check_interval():
    def fit(ask):
        pl.seed_everything(0, verbose=False)
        model = Everything()
        watcher = Watcher()
        run = make_trainer(
            max_epochs=2,
            accumulate_grad_batches=3,
            val_check_interval=2,
            callbacks=[watcher, make_refresh(1)] if ask else [watcher],
        )
        run.fit(wrap(model) if ask else model, make_loader(), held_out())
        return model, watcher, run

    plain, seen_plain, run_plain = fit(ask=False)
    model, seen, run = fit(ask=True)
    assert run.global_step == run_plain.global_step == 4
    assert seen.rates == seen_plain.rates
    assert seen.clips == seen_plain.clips
    in_step = ("optimizer_step", "validation_step", "backward", "on_before_zero_grad")
    for name in in_step:
        assert model.calls.count(name) == plain.calls.count(name), name


@pytest.mark.parametrize("client", [InlineClient, RestlessTowers])
def test_early_stopping_and_checkpoints_watch_the_models_metrics(client, tmp_path):
    pl.seed_everything(0, verbose=False)
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    keep = ModelCheckpoint(tmp_path, "{epoch}-{val/loss:.3f}", monitor="val/loss", save_top_k=2)
    run = make_trainer(
        max_epochs=9, callbacks=[stop, keep, make_refresh(1)], enable_checkpointing=True, log_every_n_steps=1
    )
    run.fit(wrap(client()), make_loader(), held_out())
    assert stop.stopped_epoch == 1
    assert run.current_epoch == 2
    assert keep.best_model_score == min(keep.best_k_models.values())
    assert len(list(tmp_path.rglob("*.ckpt"))) == 2
    restored = client.load_from_checkpoint(keep.best_model_path)
    score = make_trainer().validate(restored, held_out(), verbose=False)[0]["val/loss"]
    assert score == pytest.approx(keep.best_model_score.item())


def test_torchmetrics_object_is_reset_each_epoch():
    def fit(ask):
        pl.seed_everything(0, verbose=False)
        model, logger = RestlessTowers(), MemoryLogger()
        callbacks = [make_refresh()] if ask else []
        run = make_trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1)
        run.fit(wrap(model) if ask else model, make_loader())
        return model, logger

    model, logger = fit(ask=True)
    mean, steps = logger.values("train/mean_loss"), logger.values("train/loss_step")
    assert len(mean) == 3
    for epoch, value in enumerate(mean):
        assert value == pytest.approx(sum(steps[6 * epoch : 6 * epoch + 6]) / 6, rel=1e-5)
    assert model.mean_loss.update_count == 0
    _, logged_before = fit(ask=False)
    assert logger.names - {name for name in logger.names if name.startswith("ask/")} == logged_before.names


def test_callbacks_of_the_model_and_its_attributes_seen_from_callbacks():
    class Note(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(
                (pl_module.margin, pl_module.hparams.learning_rate, pl_module.encode_text(batch))
            )
            pl_module.margin += 1

    class Client(PlainTowers):
        margin = 0

        def __init__(self):
            super().__init__()
            self.note = Note()

        def configure_callbacks(self):
            return [self.note, EarlyStopping("step_margin", mode="max", check_on_train_epoch_end=True)]

        def training_step(self, batch, batch_idx):
            self.log("step_margin", float(self.margin))
            return super().training_step(batch, batch_idx)

    model = Client()
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(model), make_loader())
    assert [margin for margin, _, _ in model.note.seen] == list(range(6))
    assert model.margin == 6, "written through to the model"
    assert {rate for _, rate, _ in model.note.seen} == {1e-2}


def test_new_attribute_set_by_a_callback_reaches_the_model():
    """`pl_module.curriculum = ...` in a callback, `getattr(self, "curriculum", ...)` in the model."""

    class Curriculum(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.curriculum = trainer.current_epoch

    class Client(PlainTowers):
        def training_step(self, batch, batch_idx):
            self.log("curriculum", float(getattr(self, "curriculum", -1)), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    watcher = Watcher()
    make_trainer(callbacks=[make_refresh(), watcher, Curriculum()]).fit(wrap(Client()), make_loader())
    assert [row["curriculum"] for row in watcher.metrics] == [0, 1, 2]


def test_model_with_attributes_named_like_the_wrappers():
    class Client(CriterionClient):
        """`model`, `loss`, `step` are common names."""

        def __init__(self):
            super().__init__()
            self.loss, self.model, self.step = nn.Identity(), nn.Linear(2, 2), 5

        def training_step(self, batch, batch_idx):
            assert self.step == 5
            assert isinstance(self.model, nn.Linear)
            return self.loss(super().training_step(batch, batch_idx))

    model = Client()
    module = wrap(model, criterion="loss_fn")
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert list(module.state_dict()) == list(model.state_dict())
    fresh = wrap(Client(), criterion="loss_fn")
    fresh.load_state_dict(module.state_dict())
    assert_same_weights(fresh.model, model)


def test_manual_hooks_see_the_ask_loss():
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.before_backward, self.after = [], []

        def on_before_backward(self, loss):
            self.before_backward.append(loss.item())

        def on_before_optimizer_step(self, optimizer):
            self.after.append(sum(float(p.grad.abs().sum()) for p in self.parameters()) > 0)

    model, watcher = Client(), Watcher()
    make_trainer(max_epochs=1, callbacks=[make_refresh(), watcher]).fit(wrap(model), make_loader())
    assert model.before_backward == watcher.losses
    assert model.after == [True] * 6


def test_learning_rate_monitor_and_summary(capsys):
    logger = MemoryLogger()
    run = make_trainer(
        callbacks=[make_refresh(), LearningRateMonitor(), ModelSummary(2)], logger=logger, log_every_n_steps=1
    )
    run.fit(wrap(FrozenClient()), make_loader())
    rates = {name for name in logger.names if name.startswith("lr-")}
    assert rates == {"lr-AdamW/pg1", "lr-AdamW/pg2"}
    assert logger.hyperparameters == {"learning_rate": 1e-2}


def test_backbone_finetuning_finds_the_backbone():
    class Client(PlainTowers):
        @property
        def backbone(self):
            return self.audio_encoder

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    pl.seed_everything(0, verbose=False)
    model = Client()
    before = model.audio_encoder.weight.clone()
    grown = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            grown.append(torch.equal(pl_module.audio_encoder.weight, before))

    finetune = BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
    make_trainer(max_epochs=3, callbacks=[make_refresh(1), finetune, Look()]).fit(wrap(model), make_loader())
    assert grown == [True, True, False]


def test_data_and_transfer_hooks_of_the_model():
    class Client(PlainTowers):
        def train_dataloader(self):
            return make_loader()

        def val_dataloader(self):
            return held_out()

        def validation_step(self, batch, batch_idx):
            assert batch["moved"]
            self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return super().transfer_batch_to_device(batch, device, dataloader_idx) | {"moved": True}

        def training_step(self, batch, batch_idx):
            assert batch["moved"]
            return super().training_step(batch, batch_idx)

        def encode_audio(self, batch):
            assert batch["moved"], "at a refresh, too"
            return super().encode_audio(batch)

    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(wrap(Client()))
    assert set(own_metrics(run.callback_metrics)) == {"val/loss"}


def test_datamodule_and_its_hooks():
    class Data(pl.LightningDataModule):
        stages = ()

        def setup(self, stage):
            self.stages = (*self.stages, stage)

        def train_dataloader(self):
            return make_loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch | {"audio": 2 * batch["audio"]}

    data, model = Data(), PlainTowers()
    module = wrap(model)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, datamodule=data)
    assert data.stages == ("fit",)


def test_setup_and_configure_model_of_the_model():
    class Client(PlainTowers):
        stages = ()

        def __init__(self):
            super().__init__()
            self.head = None

        def setup(self, stage=None):
            self.stages = (*self.stages, stage)

        def configure_model(self):
            if self.head is None:
                self.head = nn.Linear(8, 8)

        def encode_audio(self, batch):
            return self.head(super().encode_audio(batch))

    model = Client()
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(wrap(model), make_loader())
    assert model.stages == ("fit",)
    assert "head.weight" in model.state_dict()


def test_barebones_trainer():
    watcher = Watcher()
    run = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=2, callbacks=[make_refresh(1), watcher])
    run.fit(wrap(PlainTowers()), make_loader())
    assert len(watcher.losses) == 12


def test_train_override_of_the_model_is_respected():
    class Client(RestlessTowers):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    modes = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append((pl_module.norm.training, pl_module.dropout.training))

    make_trainer(callbacks=[make_refresh(1), Look()]).fit(wrap(Client()).train(), make_loader(), held_out())
    assert set(modes) == {(False, True)}


def test_barely_more_than_two_methods():
    """No training step, no hooks: encode mode, and nothing else is invented."""

    class Client(Towers):
        pass

    module = wrap(Client())
    assert module.ask_step == "encode"
    assert isinstance(module, ASKModule)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())


def test_callback_that_the_model_brings_itself():
    class Client(PlainTowers):
        def configure_callbacks(self):
            return [make_refresh(1)]

    watcher = Watcher()
    make_trainer(callbacks=[watcher]).fit(wrap(Client()), make_loader())
    assert len(set(watcher.knowledge)) == 3


def test_wrapped_again_after_training():
    model = PlainTowers()
    for settings in ({}, {"num_neighbors": 2}):
        make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(model, settings), make_loader())
    module = wrap(model, step="encode")
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert module.model is model


def test_attribute_that_nobody_has():
    module = wrap(PlainTowers())
    with pytest.raises(AttributeError, match="nowhere"):
        _ = module.nowhere
    assert not hasattr(module, "nowhere")
    assert getattr(module, "nowhere", 3) == 3


def test_trainer_is_known_to_the_model_and_its_steps_are_counted():
    class Client(PlainTowers):
        seen = ()

        def training_step(self, batch, batch_idx):
            self.seen = (
                *self.seen,
                (self.current_epoch, self.global_step, self.trainer.num_training_batches),
            )
            return super().training_step(batch, batch_idx)

    model = Client()
    make_trainer(max_epochs=2, callbacks=[make_refresh()]).fit(wrap(model), make_loader())
    assert model.seen == tuple((step // 6, step, 6) for step in range(12))


def test_a_hook_of_a_subclass_of_the_wrapper_is_called():
    called = []

    class Client(PlainTowers):
        def on_train_epoch_start(self):
            called.append("model")

        def on_train_epoch_end(self):
            called.append("model's end")

    class Mine(ASKModule):
        def on_train_epoch_start(self):
            called.append("subclass")
            self.model.on_train_epoch_start()

    module = Mine(Client(), ReliabilityOTLoss(num_neighbors=4))
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert called == ["subclass", "model", "model's end"]


@pytest.mark.parametrize("moment", ["after wrapping", "in setup"])
def test_a_hook_that_the_model_gets_later_is_called(moment):
    called = []

    class Client(PlainTowers):
        def setup(self, stage):
            if moment == "in setup":
                self.on_train_epoch_start = lambda: called.append(self.trainer.current_epoch)

    model = Client()
    module = wrap(model)
    if moment == "after wrapping":
        model.on_train_epoch_start = lambda: called.append(model.trainer.current_epoch)
    run = make_trainer(max_epochs=2, callbacks=[make_refresh()])
    run.fit(module, make_loader())
    assert called == [0, 1]
    del model.on_train_epoch_start
    Client.setup = pl.LightningModule.setup
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert called == [0, 1], "nor is one that it has no more"


def test_a_callback_that_counts_in_an_attribute_called_step():
    """It is the model's, as without ASK."""

    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.step = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.step += 1

    model = PlainTowers()
    make_trainer(max_epochs=1, callbacks=[make_refresh(), Count()]).fit(wrap(model), make_loader())
    assert model.step == 6
