"""Random streams in checkpoints: a run that is resumed draws what a run without a break draws."""

import random
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from ask_lightning.callbacks import LoaderStateCallback, RandomStateCallback
from tests.helpers.clients import (
    EpochSeededSampler,
    Pairs,
    PlainTowers,
    held_out,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.ranks import on_ranks

EPOCHS, STEPS = 3, 6
LAST = STEPS - 1


class NoisyPairs(Pairs):
    """Augments what it reads."""

    def __getitem__(self, row):
        pair = super().__getitem__(row)
        return pair | {"audio": pair["audio"] + 0.1 * random.random() * torch.rand(len(pair["audio"]))}


class Drawing(PlainTowers):
    """Draws by dropout, by augmentation and from the global streams, and notes what."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.drawn: list[tuple[float, float, list[int]]] = []

    def encode_audio(self, batch):
        return self.dropout(super().encode_audio(batch))

    def validation_step(self, batch, batch_idx):
        torch.rand(1)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"audio": batch["audio"] + 0.1 * torch.rand_like(batch["audio"])}

    def training_step(self, batch, batch_idx):
        clips = batch["clip_id"].tolist()
        self.drawn.append((random.random(), float(np.random.rand()), clips))  # noqa: NPY002
        return super().training_step(batch, batch_idx)


class Scheduled(Drawing):
    """Asks for the number of steps, for which Lightning makes the loader before a checkpoint is read."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == EPOCHS * STEPS
        return super().configure_optimizers()


class DrawingInHooks(Drawing):
    """Draws in hooks as well, of which a resumed run has one more and one that it had to make up for."""

    def on_train_start(self):
        torch.rand(3)

    def on_train_epoch_end(self):
        torch.rand(5)


class SaveAt(pl.Callback):
    """Writes a checkpoint behind a batch, behind the validation or at the end of an epoch."""

    def __init__(self, path: Path, epoch: int, batch: int | str | None) -> None:
        self.path, self.epoch, self.batch = path, epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer, pl_module):
        if self.batch == "validated" and trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.batch is None and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


class Stream(torch.utils.data.IterableDataset):
    """Draws its order and its noise whenever it is read."""

    def __iter__(self):
        pairs = NoisyPairs(48)
        return (pairs[row] for row in torch.randperm(48).tolist())


def loader(kind: str):
    if kind == "stream":
        return torch.utils.data.DataLoader(Stream(), batch_size=8)
    if not kind.startswith("stateful"):
        workers = 0 if kind == "plain" else 1
        if kind == "sampler":
            pairs = NoisyPairs(48)
            sampler = EpochSeededSampler(len(pairs))
            return torch.utils.data.DataLoader(pairs, batch_size=8, sampler=sampler, num_workers=1)
        return torch.utils.data.DataLoader(NoisyPairs(48), batch_size=8, shuffle=True, num_workers=workers)
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    if kind == "stateful stream":
        return stateful.StatefulDataLoader(Stream(), batch_size=8)
    return stateful.StatefulDataLoader(NoisyPairs(48), batch_size=8, shuffle=True)


def fit(
    callbacks: list,
    kind: str = "plain",
    *,
    resume: Path | None = None,
    T: int = 1,
    model_class: type[Drawing] = Drawing,
    validated: bool = False,
    seed: int = 1,
    **settings,
) -> dict:
    """What a run has drawn, and its weights; what is done before a resume draws as well."""
    pl.seed_everything(seed, verbose=False)
    model = model_class()
    if resume is not None:
        random.random(), np.random.rand(), torch.rand(7)  # noqa: NPY002
    if kind.startswith("stateful"):
        callbacks = [*callbacks, LoaderStateCallback()]
    run = make_trainer(max_epochs=EPOCHS, callbacks=[make_refresh(T), *callbacks], **settings)
    run.fit(wrap(model), loader(kind), held_out() if validated else None, ckpt_path=resume)
    return {"drawn": model.drawn, "weights": model.state_dict()}


@pytest.mark.parametrize(
    ("kind", "epoch", "batch", "model_class"),
    [
        ("plain", 0, None, Drawing),
        ("plain", 1, None, Scheduled),
        ("plain", 1, LAST, Scheduled),
        ("plain", 1, "validated", Scheduled),
        ("plain", 1, "validated", DrawingInHooks),
        ("workers", 1, None, Scheduled),
        ("workers", 1, "validated", Drawing),
        ("sampler", 1, None, Scheduled),
        ("sampler", 1, LAST, Drawing),
        ("stateful", 1, None, Scheduled),
        ("stateful", 1, 2, Scheduled),
        ("stateful", 1, 2, DrawingInHooks),
        ("stateful", 1, LAST, Drawing),
        ("stateful", 1, "validated", Scheduled),
        ("stateful", 1, "validated", DrawingInHooks),
        ("stream", 1, None, Drawing),
        ("stream", 1, "validated", Drawing),
        ("stateful stream", 1, None, Drawing),
        ("stateful stream", 1, "validated", Drawing),
    ],
)
def test_a_resumed_run_draws_as_one_without_a_break(kind, epoch, batch, model_class, tmp_path):
    path = tmp_path / "a.ckpt"
    settings = {"model_class": model_class, "validated": batch == "validated"}
    # At these checkpoints a refresh has drawn its noise from other places of the streams.
    settings["T"] = 15 if batch == LAST or "stream" in kind else 1
    whole = fit([RandomStateCallback(), SaveAt(path, epoch, batch)], kind, **settings)
    torch.load(path, weights_only=True)
    resumed = fit([RandomStateCallback()], kind, resume=path, **settings)
    done = epoch * STEPS + batch + 1 if isinstance(batch, int) else (epoch + 1) * STEPS
    assert resumed["drawn"] == whole["drawn"][done:]
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)
    assert fit([], kind, resume=path, **settings)["drawn"] != resumed["drawn"]


def test_inside_an_epoch_a_loader_without_state_reads_the_order_of_this_epoch_again(tmp_path):
    path = tmp_path / "a.ckpt"
    whole = fit([RandomStateCallback(), SaveAt(path, 1, 2)], "sampler")
    resumed = fit([RandomStateCallback()], "sampler", resume=path)
    clips = [clips for *_, clips in whole["drawn"][STEPS:]]
    assert [clips for *_, clips in resumed["drawn"]][:2] == clips[:2]


@pytest.mark.parametrize(("interval", "batch"), [(0.5, STEPS // 2 - 1), (1.0, LAST)])
def test_a_checkpoint_in_front_of_a_validation_is_warned_of(interval, batch, tmp_path):
    with pytest.warns(UserWarning, match="at a step behind which a validation is due"):
        fit(
            [RandomStateCallback(), SaveAt(tmp_path / "a.ckpt", 1, batch)],
            validated=True,
            val_check_interval=interval,
        )


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


def told_of_another_seed(path: str, seed: int, **settings) -> bool:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit([RandomStateCallback()], resume=Path(path), seed=seed, **settings)
    told = f"resumes with seed_everything({seed}) in place of 1. Lightning draws the order"
    return any(told in str(each.message) for each in seen)


def resume_with_seeds_on_ranks(path: str) -> list[bool]:
    settings = {"devices": 2, "strategy": "ddp"}
    fit([RandomStateCallback(), SaveAt(Path(path), 0, None)], **settings)
    return [told_of_another_seed(path, seed, **settings) for seed in (1, 2)]


def test_another_seed_is_told_where_the_order_of_several_processes_depends_on_it(tmp_path):
    path = str(tmp_path / "a.ckpt")
    first, _ = on_ranks(2, resume_with_seeds_on_ranks, path, grouped=False)
    assert first == [False, True]
    fit([RandomStateCallback(), SaveAt(Path(path), 0, None)])
    assert not told_of_another_seed(path, 2), "one process goes on with the order of the checkpoint"
