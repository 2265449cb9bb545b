"""Random streams in checkpoints: a run that is resumed draws what a run without a break draws."""

import random
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from ask_lightning.callbacks import LoaderStateCallback, RandomStateCallback
from tests.helpers.clients import Pairs, PlainTowers, make_refresh, make_trainer, wrap
from tests.helpers.ranks import on_ranks

EPOCHS, STEPS = 3, 6


class Drawing(PlainTowers):
    """Draws by dropout and from the global streams, and notes what."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.drawn: list[tuple[float, float, list[int]]] = []

    def encode_audio(self, batch):
        return self.dropout(super().encode_audio(batch))

    def training_step(self, batch, batch_idx):
        clips = batch["clip_id"].tolist()
        self.drawn.append((random.random(), float(np.random.rand()), clips))  # noqa: NPY002
        return super().training_step(batch, batch_idx)


class Scheduled(Drawing):
    """Asks for the number of steps, for which Lightning makes the loader before a checkpoint is restored."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, int(self.trainer.estimated_stepping_batches))
        return optimizer


class Validated(Scheduled):
    """Validates as well."""

    def validation_step(self, batch, batch_idx):
        self.encode_audio(batch)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Pairs(8), batch_size=8)


class SaveAt(pl.Callback):
    """Writes a checkpoint behind a batch, at the end of an epoch, or behind its validation."""

    def __init__(self, path: Path, epoch: int, batch: int | str | None) -> None:
        self.path, self.epoch, self.batch = path, epoch, batch

    def on_validation_end(self, trainer, pl_module):
        if (trainer.current_epoch, "validation") == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.batch is None and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def loader(kind: str):
    if kind != "stateful":
        workers = 1 if kind == "workers" else 0
        return torch.utils.data.DataLoader(Pairs(48), batch_size=8, shuffle=True, num_workers=workers)
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    return stateful.StatefulDataLoader(Pairs(48), batch_size=8, shuffle=True)


def fit(
    callbacks: list,
    kind: str = "plain",
    *,
    model_class: type[Drawing] = Drawing,
    resume: Path | None = None,
    **settings,
) -> dict:
    """What a run has drawn, and its weights; what is done before a resume draws as well."""
    pl.seed_everything(1, verbose=False)
    model = model_class()
    if resume is not None:
        random.random(), np.random.rand(), torch.rand(7)  # noqa: NPY002
    if kind == "stateful":
        callbacks = [*callbacks, LoaderStateCallback()]
    run = make_trainer(max_epochs=EPOCHS, callbacks=[make_refresh(1), *callbacks], **settings)
    run.fit(wrap(model), loader(kind), ckpt_path=resume)
    return {"drawn": model.drawn, "weights": model.state_dict()}


@pytest.mark.parametrize(
    ("kind", "epoch", "batch"),
    [
        ("plain", 0, None),
        ("plain", 1, None),
        ("plain", 1, STEPS - 1),
        ("workers", 1, None),
        ("stateful", 1, None),
        ("stateful", 1, 2),
        ("stateful", 1, STEPS - 1),
    ],
)
@pytest.mark.parametrize("model_class", [Drawing, Scheduled])
def test_a_resumed_run_draws_as_one_without_a_break(kind, epoch, batch, model_class, tmp_path):
    path = tmp_path / "a.ckpt"
    whole = fit([RandomStateCallback(), SaveAt(path, epoch, batch)], kind, model_class=model_class)
    torch.load(path, weights_only=True)
    resumed = fit([RandomStateCallback()], kind, model_class=model_class, resume=path)
    done = (epoch + 1) * STEPS if batch is None else epoch * STEPS + batch + 1
    assert resumed["drawn"] == whole["drawn"][done:]
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)
    assert fit([], kind, model_class=model_class, resume=path)["drawn"] != resumed["drawn"]


@pytest.mark.parametrize("kind", ["plain", "workers", "stateful"])
@pytest.mark.parametrize("every_epochs", [1, 2])
def test_a_resumed_run_draws_as_one_without_a_break_behind_a_validation(kind, every_epochs, tmp_path):
    path = tmp_path / "a.ckpt"
    settings = {"model_class": Validated, "check_val_every_n_epoch": every_epochs}
    whole = fit([RandomStateCallback(), SaveAt(path, 1, "validation")], kind, **settings)
    resumed = fit([RandomStateCallback()], kind, resume=path, **settings)
    assert resumed["drawn"] == whole["drawn"][2 * STEPS :]
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "is_exact"), [(1, True), (2, False), (STEPS - 1, True)])
def test_a_checkpoint_in_front_of_a_validation_is_pointed_at(batch, is_exact, tmp_path, recwarn):
    saving = [RandomStateCallback(), SaveAt(tmp_path / "a.ckpt", 1, batch)]
    fit(saving, "stateful", model_class=Validated, val_check_interval=3)
    messages = [str(one.message) for one in recwarn]
    assert any("behind which a validation is due" in message for message in messages) != is_exact


def test_a_run_draws_the_same_with_the_callback_and_without():
    assert fit([RandomStateCallback()])["drawn"] == fit([])["drawn"]


def test_a_second_run_of_the_same_objects_begins_anew(tmp_path):
    callback = RandomStateCallback()
    fit([callback, SaveAt(tmp_path / "a.ckpt", 0, None)])
    fit([callback], resume=tmp_path / "a.ckpt")
    assert fit([callback])["drawn"] == fit([])["drawn"]


class OwnStream(pl.Callback):
    """Gives each process random numbers of its own."""

    def on_train_start(self, trainer, pl_module):
        random.seed(trainer.global_rank)


def fit_on_ranks(path: str) -> dict:
    settings = {"devices": 2, "strategy": "ddp"}
    saving = [RandomStateCallback(), SaveAt(Path(path), 0, None)]
    whole = fit([OwnStream(), *saving], **settings)
    return {"whole": whole, "resumed": fit([RandomStateCallback()], resume=Path(path), **settings)}


def test_each_process_has_its_own_streams(tmp_path):
    path = tmp_path / "a.ckpt"
    first, second = on_ranks(2, fit_on_ranks, str(path), grouped=False)
    for rank in (first, second):
        assert rank["resumed"]["drawn"] == rank["whole"]["drawn"][STEPS // 2 :]
        torch.testing.assert_close(rank["resumed"]["weights"], rank["whole"]["weights"], rtol=0, atol=0)
    assert first["whole"]["drawn"] != second["whole"]["drawn"]
    with pytest.warns(UserWarning, match="streams of 2 processes, and the run resumes on 1"):
        fit([RandomStateCallback()], resume=path)
