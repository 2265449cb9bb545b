"""A refresh leaves nothing behind but a new base: streams, modes, logs, stages, batches."""

import random
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ask_lightning import KnowledgeRefreshCallback
from tests.helpers.clients import (
    FrozenClient,
    MemoryLogger,
    Pairs,
    PlainTowers,
    RestlessTowers,
    SelfContained,
    Watcher,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)


def streams() -> tuple:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


class Spied(KnowledgeRefreshCallback):
    """Compares the world before and after each refresh."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **({"num_prototypes": 6} | settings))
        self.refreshed_at: list[tuple[int, int]] = []

    def refresh(self, trainer, pl_module):
        before = self.world(trainer, pl_module)
        try:
            super().refresh(trainer, pl_module)
            self.refreshed_at.append((trainer.current_epoch, trainer.global_step))
        finally:
            assert self.world(trainer, pl_module) == before

    def world(self, trainer, pl_module):
        modes = {name: part.training for name, part in pl_module.named_modules()}
        buffers = {name: buffer.sum().item() for name, buffer in pl_module.named_buffers()}
        logs = [vars(part).get("log") for part in pl_module.modules()]
        stage = trainer.state.stage, trainer.state.fn, pl_module._current_fx_name
        return (
            streams(),
            modes,
            buffers,
            stage,
            logs,
            torch.is_grad_enabled(),
            signal.getsignal(signal.SIGINT),
        )


class Restless(Pairs):
    def __getitem__(self, row):
        return super().__getitem__(row) | {"noise": random.random() + np.random.random() + torch.rand(())}  # noqa: NPY002


class DrawingEncoders(RestlessTowers):
    """Draws from all streams wherever it is called."""

    def encode_text(self, batch):
        torch.rand(1), random.random(), np.random.random()  # noqa: NPY002
        return super().encode_text(batch)


def drawing_source():
    torch.rand(3), random.random(), np.random.random()  # noqa: NPY002
    return Restless(48)


@pytest.mark.parametrize("client", [DrawingEncoders, FrozenClient])
@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (None, {}),
        (drawing_source, {}),
        (None, {"num_workers": 1}),
        (Restless(48), {"index": "IVF2,Flat"}),
    ],
    ids=["training data", "callable", "workers", "faiss"],
)
def test_world_is_as_it_was(client, source, settings):
    pl.seed_everything(0, verbose=False)
    spied = Spied(2, source, **settings)
    data = DataLoader(Restless(48), 8, shuffle=True)
    run = make_trainer(max_epochs=4, callbacks=[spied])
    run.fit(wrap(client()), data, held_out())
    assert spied.refreshed_at == [(0, 0), (2, 12)]


@pytest.mark.parametrize(("T", "epochs"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_refresh_whenever_the_epoch_is_divisible(T, epochs):
    spied = Spied(T)
    run = make_trainer(max_epochs=5, limit_train_batches=2, callbacks=[spied])
    run.fit(wrap(PlainTowers()), make_loader())
    assert [epoch for epoch, _ in spied.refreshed_at] == epochs


def test_refreshed_before_the_first_step_of_the_epoch_with_its_encoders():
    """The base of epoch e is made by the weights with which epoch e begins."""
    moments = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                base = pl_module.loss.knowledge
                with torch.no_grad():
                    now = pl_module.model.audio_encoder(Pairs(48).audio)
                moments.append(base.fine.audio.allclose(nn.functional.normalize(now, dim=1), atol=1e-6))

    make_trainer(max_epochs=4, callbacks=[make_refresh(2), Look()]).fit(wrap(PlainTowers()), make_loader())
    assert moments == [True, False, True, False]


def test_evaluation_mode_without_gradient_in_a_validation_stage():
    seen = []

    class Client(RestlessTowers):
        def encode_audio(self, batch):
            if not torch.is_grad_enabled():
                seen.append((self.training, self.dropout.training, self.norm.training, self.trainer.training))
            return super().encode_audio(batch)

    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(Client()), make_loader())
    assert set(seen) == {(False, False, False, False)}
    assert len(seen) == 6


def test_batch_norm_statistics_and_counters_do_not_see_the_source():
    model = RestlessTowers()
    make_trainer(max_epochs=2, callbacks=[make_refresh(1)]).fit(wrap(model), make_loader())
    assert model.norm.num_batches_tracked == 12


def test_logs_of_encoders_do_not_leak():
    class Client(PlainTowers):
        def encode_audio(self, batch):
            embeddings = super().encode_audio(batch)
            self.log("norm/audio", embeddings.norm(), on_step=False, on_epoch=True, reduce_fx="sum")
            self.log_dict({"count": float(len(embeddings))}, on_step=False, on_epoch=True, reduce_fx="sum")
            return embeddings

    watcher = Watcher()
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(1), watcher])
    run.fit(wrap(Client()), make_loader())
    assert [row["count"] for row in watcher.metrics] == [48.0, 48.0]


def test_transfer_hooks_run_and_know_that_it_is_no_training():
    class Client(PlainTowers):
        moments = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch | {"before": True}

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            assert batch["before"]
            return super().transfer_batch_to_device(batch, device, dataloader_idx) | {"moved": str(device)}

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert batch["moved"] == "cpu"
            if self.trainer.training:
                batch = batch | {"audio": batch["audio"] + 100}
            return batch | {"augmented": self.trainer.training}

        def encode_audio(self, batch):
            self.moments = (*self.moments, (torch.is_grad_enabled(), batch["augmented"]))
            return super().encode_audio(batch)

    model = Client()
    module = wrap(model)
    with torch.no_grad():
        clean = nn.functional.normalize(model.audio_encoder(Pairs(48).audio), dim=1)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert set(model.moments) == {(True, True), (False, False)}
    assert module.loss.knowledge.fine.audio.allclose(clean, atol=1e-6)


def test_transfer_hooks_of_a_datamodule():
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer is not None
            return batch | {"audio": batch["audio"] + (100 if self.trainer.training else 1)}

    model = PlainTowers()
    module = wrap(model)
    with torch.no_grad():
        shifted = nn.functional.normalize(model.audio_encoder(Pairs(48).audio + 1), dim=1)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, datamodule=Data())
    assert module.loss.knowledge.fine.audio.allclose(shifted, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("ask", [True, False])
def test_rows_are_float32_in_every_precision(precision, ask):
    dtypes = set()

    class Client(PlainTowers if ask else SelfContained):
        validation_step = pl.LightningModule.validation_step

        def encode_audio(self, batch):
            embeddings = super().encode_audio(batch)
            dtypes.add(embeddings.dtype)
            return embeddings

    model = Client()
    watcher = Watcher()
    run = make_trainer(max_epochs=2, precision=precision, callbacks=[make_refresh(1), watcher])
    run.fit(wrap(model) if ask else model, make_loader())
    base = run.callbacks[0].target.loss.knowledge
    assert base.fine.audio.dtype == base.coarse.text.dtype == torch.float32
    assert base.fine.audio.norm(dim=1).allclose(torch.ones(48), atol=1e-6)
    wanted = {"bf16": torch.bfloat16, "32-t": torch.float32, "64-t": torch.float64}[precision[:4]]
    assert dtypes == {wanted}
    assert all(loss == loss for loss in watcher.losses)


NAMES = {"ask/loss", "ask/knowledge_age", "ask/refresh_seconds", "ask/pairs_per_second"}


def test_names_of_the_logs():
    logger = MemoryLogger()
    run = make_trainer(max_epochs=5, callbacks=[make_refresh(2)], logger=logger, log_every_n_steps=1)
    run.fit(wrap(PlainTowers()), make_loader())
    per_granularity = {
        f"ask/{term}_{name}" for term in ("plan_entropy", "plan_diagonal") for name in ("fine", "coarse")
    }
    per_direction = {
        f"ask/{term}_{way}"
        for term in ("contrastive", "factor", "psi_fine", "psi_coarse", "factor_fine", "factor_coarse")
        for way in ("t2a", "a2t")
    }
    drift = {f"ask/{term}_{side}" for term in ("rdm", "mean_similarity") for side in ("audio", "text")}
    assert logger.names == NAMES | per_granularity | per_direction | drift | {"epoch"}
    assert logger.values("ask/knowledge_age") == [0, 1, 0, 1, 0]
    assert len(logger.values("ask/loss")) == 30
    assert len(logger.values("ask/refresh_seconds")) == 3
    assert len(logger.values("ask/rdm_audio")) == 2, "there is nothing to drift from at first"
    assert all(value > 0 for value in logger.values("ask/rdm_audio") + logger.values("ask/pairs_per_second"))


def test_drift_at_a_refresh_of_encoders_that_stand_still():
    class Still(PlainTowers):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    logger = MemoryLogger()
    run = make_trainer(callbacks=[make_refresh(1)], logger=logger)
    run.fit(wrap(Still()), make_loader())
    assert logger.values("ask/rdm_audio") == logger.values("ask/rdm_text") == [0, 0]


def test_no_drift_between_sources_of_different_size():
    class Client(PlainTowers):
        def train_dataloader(self):
            return make_loader(16 * (1 + self.trainer.current_epoch))

    logger = MemoryLogger()
    run = make_trainer(reload_dataloaders_every_n_epochs=1, callbacks=[make_refresh(1)], logger=logger)
    run.fit(wrap(Client()))
    assert not logger.values("ask/rdm_audio")


@pytest.fixture
def _signals():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(Pairs):
    """Raises in the middle of a reading, once that is armed."""

    error: BaseException | None = None

    def __getitem__(self, row):
        if row == 30 and self.error is not None:
            raise self.error
        random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
        return super().__getitem__(row)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("in the dataset")], ids=repr)
def test_interrupted_refresh_leaves_everything_as_it_was(error):
    source = Interrupting(48)

    class Arm(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            source.error = error

    class Client(RestlessTowers):
        def on_train_start(self):
            self.norm.eval()

    pl.seed_everything(0, verbose=False)
    spied, watcher = Spied(1, source), Watcher()
    module = wrap(Client())
    run = make_trainer(callbacks=[spied, watcher, Arm()])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ZeroDivisionError):
        run.fit(module, DataLoader(Pairs(48), 8, shuffle=True))
    assert spied.refreshed_at == [(0, 0)], "Spied has compared streams, modes, stage and logs"
    assert module.loss.knowledge.fingerprint == watcher.knowledge[-1]
    assert not module.model.norm.training
    assert module.model.dropout.training


def test_nan_at_a_later_refresh_keeps_the_base_in_use_and_on_disk(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ask_lightning import KnowledgeBase

    class Breaking(PlainTowers):
        def on_train_epoch_end(self):
            if self.trainer.current_epoch == 1:
                with torch.no_grad():
                    self.text_encoder.weight[0, 0] = torch.nan

    module, watcher = wrap(Breaking()), Watcher()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = make_trainer(max_epochs=5, callbacks=[make_refresh(2), watcher, keep], enable_checkpointing=True)
    with pytest.raises(
        ValueError, match=r"text embeddings of 48 of 48 source rows contain NaN or Inf \(rows 0"
    ):
        run.fit(module, make_loader())
    assert len(watcher.losses) == 12
    assert module.loss.knowledge.fingerprint == watcher.knowledge[-1]
    (snapshot,) = tmp_path.glob("*.safetensors")
    assert KnowledgeBase.load(snapshot).fingerprint == watcher.knowledge[-1]


def test_sanity_validation_before_the_first_base():
    """A module that calls the loss in its validation step, too."""
    logger, model = MemoryLogger(), SelfContained()
    run = make_trainer(max_epochs=2, callbacks=[make_refresh()], num_sanity_val_steps=1, logger=logger)
    with pytest.warns(UserWarning, match="evaluates without knowledge, as plain NT-Xent"):
        run.fit(model, make_loader(), held_out())
    assert len(logger.values("val/loss")) == 2
    assert model.objective.knowledge is not None


def test_validation_terms_are_not_logged_as_training_terms():
    logger, model = MemoryLogger(), SelfContained()
    watcher = Watcher()
    run = make_trainer(
        max_epochs=2,
        callbacks=[make_refresh(), watcher],
        val_check_interval=2,
        logger=logger,
        log_every_n_steps=1,
    )
    run.fit(model, make_loader(), held_out())
    assert logger.values("ask/loss") == watcher.losses


def test_module_without_the_wrapper():
    class Client(SelfContained):
        def encode_ids(self, batch):
            return batch["clip_id"]

        def training_step(self, batch, batch_idx):
            audio, text = self.encode_audio(batch), self.encode_text(batch)
            return self.objective(audio, text, ids=self.encode_ids(batch))

    pl.seed_everything(0, verbose=False)
    model, watcher = Client(exclude_self=True), Watcher()
    run = make_trainer(max_epochs=6, callbacks=[make_refresh(2), watcher])
    run.fit(model, make_loader(captions_per_clip=2))
    assert len(set(watcher.knowledge)) == 3
    assert model.objective.knowledge.ids.tolist() == [row // 2 for row in range(48)]
    assert sum(watcher.losses[-6:]) < sum(watcher.losses[:6])


def test_module_without_the_wrapper_with_one_method_for_all():
    class Client(SelfContained):
        def embed_pairs(self, batch):
            return self.audio_encoder(batch["audio"]), self.text_encoder(batch["text"]), batch["clip_id"] + 7

    model = Client()
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(model, make_loader())
    assert model.objective.knowledge.ids.tolist() == list(range(7, 55))


def test_a_new_run_with_the_same_objects_begins_anew():
    module, spied = wrap(PlainTowers()), Spied(5)
    for _ in range(2):
        make_trainer(max_epochs=1, callbacks=[spied]).fit(module, make_loader())
    assert spied.refreshed_at == [(0, 0), (0, 0)]


def test_a_run_that_is_prolonged_goes_on():
    module, spied = wrap(PlainTowers()), Spied(3)
    run = make_trainer(max_epochs=2, callbacks=[spied])
    run.fit(module, make_loader())
    run.fit_loop.max_epochs = 4
    run.fit(module, make_loader())
    assert spied.refreshed_at == [(0, 0), (3, 18)]


def test_target_is_known_from_fit_on():
    with pytest.raises(RuntimeError, match="from the start of `fit` on"):
        _ = make_refresh().target
