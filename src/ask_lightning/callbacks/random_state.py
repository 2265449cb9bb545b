"""`RandomStateCallback`: a run that is resumed draws the random numbers of a run without a break."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn

from ask_lightning.callbacks.loader_state import LoaderStateCallback, reads_anew, training_loaders
from ask_lightning.encoding.isolation import preserved_random_state
from ask_lightning.utilities.distributed import Ranks


class RandomStateCallback(Callback):
    """Keeps the random streams of each process in checkpoints: those of Python, NumPy and torch.

    Lightning does not, so that dropout, masks, and the order of a loader without a generator of its own go on
    with other numbers after a resume. With the callback they go on exactly from checkpoints at the end of an
    epoch; inside one the place in the data has to be kept as well, by `LoaderStateCallback`.

    Notes:
        A run on another number of processes draws numbers of its own, with a warning. Worker processes of a
        loader have streams of their own, which begin anew in each epoch, and where a run resumes inside one:
        the rest of that epoch then has other crops, if the dataset draws them.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[RandomStateCallback()], logger=False)
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._has_begun = False
        self._at_epoch_start: dict[str, Any] | None = None  # where the epoch's order was drawn meanwhile

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins anew, in front of the callbacks that may draw."""
        self._loaded, self._has_begun, self._at_epoch_start = None, False, None
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Another list, because Lightning goes through the present one.
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]
        if not any(isinstance(callback, LoaderStateCallback) for callback in callbacks):
            _tell_samplers_the_epoch(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the streams of all processes to the checkpoint."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["callbacks"][self.state_key] = {
            "ranks": Ranks.current().all_gather_object(_streams()),
            "is_inside_epoch": batches.current.ready > 0 and not batches.is_last_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the streams until training is set up, which may draw from others."""
        self._loaded = state_dict or None
        if self._has_begun:  # strategies that divide the weights load a checkpoint late
            self._restore()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the streams back before the loader begins an epoch, for which it may draw its order."""
        self._has_begun = True
        self._restore()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts them back where a loader begins once more, or goes on inside an epoch."""
        if self._loaded is None or _has_only_to_end(trainer):
            return
        if self._loaded["is_inside_epoch"]:  # whose order was drawn before the checkpoint
            self._restore_before_a_batch_is_read(trainer)
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if reads_anew(trainer) or any(isinstance(callback, LoaderStateCallback) for callback in callbacks):
            self._restore()
        if not reads_anew(trainer) and self._loaded is not None:
            self._at_epoch_start = self._loaded["ranks"][Ranks.current().rank]
        self._loaded = None

    @contextmanager
    def drawing_from_epoch_start(self) -> Iterator[None]:
        """Draw what a run without a break draws before the order of the epoch, and go on behind the order.

        In the first epoch of a resumed run the order is drawn first.
        """
        if self._at_epoch_start is None:
            yield
            return
        with preserved_random_state():
            _put_back(self._at_epoch_start)
            yield

    def _restore_before_a_batch_is_read(self, trainer: pl.Trainer) -> None:
        """Put them back once, since what reads the batch and what moves it to its device may draw."""
        epoch_loop = trainer.fit_loop.epoch_loop
        before_fetch = epoch_loop._on_before_fetch

        def restore_before_fetch() -> None:
            self._restore()
            self._loaded = None
            before_fetch()

        epoch_loop.__dict__["_on_before_fetch"] = restore_before_fetch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts them back where the step itself reads its batches."""
        self._restore()
        self._loaded = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forgets where the epoch began."""
        self._at_epoch_start = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts them back where a run resumes behind the validation of an epoch, which it ends first."""
        self._restore()
        self._loaded = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves Lightning's loop as it was."""
        trainer.fit_loop.epoch_loop.__dict__.pop("_on_before_fetch", None)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, LoaderStateCallback) for callback in callbacks):
            trainer.fit_loop.__dict__.pop("_load_combined_loader_states", None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves Lightning's loop as it was; Lightning does not call `teardown` after an error."""
        self.teardown(trainer, pl_module, "fit")

    def _restore(self) -> None:
        """Put the streams of this process to where they were in the checkpoint."""
        if self._loaded is None:
            return
        ranks, stored = Ranks.current(), self._loaded["ranks"]
        if len(stored) == ranks.size:
            _put_back(stored[ranks.rank])
            return
        rank_zero_warn(
            f"The checkpoint holds the random streams of {len(stored)} processes, and the run resumes on "
            f"{ranks.size}, so dropout and other draws are not those of a run without a break."
        )
        self._loaded = None


def _has_only_to_end(trainer: pl.Trainer) -> bool:
    """Whether a resumed run is behind the last batch and the validation of an epoch that has not ended."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    is_over = batches.is_last_batch and batches.current.completed == batches.current.ready
    return bool(is_over and epochs.processed < epochs.ready)


def _tell_samplers_the_epoch(trainer: pl.Trainer) -> None:
    """Have samplers know the epoch before workers read ahead, to which Lightning 2.6 tells it afterwards."""
    fit_loop = trainer.fit_loop
    load_states = fit_loop._load_combined_loader_states

    def tell_and_load_states() -> None:
        epochs: Any = fit_loop.epoch_progress.current
        batches: Any = fit_loop.epoch_loop.batch_progress
        # Of a checkpoint at the last step, which Lightning counts as one of the end of the epoch later on.
        is_over = batches.is_last_batch and batches.current.processed > batches.current.completed
        for loader in training_loaders(trainer):
            _set_sampler_epoch(loader, epochs.processed + is_over)
        load_states()

    fit_loop.__dict__["_load_combined_loader_states"] = tell_and_load_states


def _streams() -> dict[str, Any]:
    """The global random streams of this process, as values of which `torch.load` refuses none."""
    _, keys, place, *gauss = np.random.get_state()  # noqa: NPY002
    streams = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys, dtype=np.int64)), place, *gauss),
        "torch": torch.get_rng_state(),
    }
    return streams | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _put_back(streams: dict[str, Any]) -> None:
    """Put the global random streams of this process to these places."""
    random.setstate(streams["python"])
    keys, *rest = streams["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(streams["torch"].cpu())
    if "cuda" in streams and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(streams["cuda"].cpu())
