"""`RandomStateCallback`: a run that is resumed draws the random numbers of a run without a break."""

from __future__ import annotations

import os
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DistributedSampler

from ask_lightning.callbacks.divided_order import sampler_of
from ask_lightning.callbacks.epoch_start import before_batches, forget_actions
from ask_lightning.callbacks.loader_state import (
    LoaderStateCallback,
    has_only_to_end,
    is_read_ahead,
    iterate_once_more,
    reads_anew,
    stateful_loaders,
    warn_of_reloading,
)
from ask_lightning.utilities.distributed import Ranks

# Where Lightning keeps the seed of `seed_everything`.
_SEED = "PL_GLOBAL_SEED"


class RandomStateCallback(Callback):
    """Keeps the random streams of each process in checkpoints: those of Python, NumPy and torch.

    Lightning does not, so that dropout, masks, and the order of a loader without a generator of its own go on
    with other numbers after a resume. With the callback they go on exactly from checkpoints at the end of an
    epoch; inside one the place in the data has to be kept as well, by `LoaderStateCallback`.

    Notes:
        A run on another number of processes draws numbers of its own, with a warning. Worker processes of a
        loader have streams of their own, which begin anew in each epoch, unless they are persistent.

    Examples:
        >>> trainer = pl.Trainer(callbacks=[RandomStateCallback()], logger=False)
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._has_begun = self._is_read = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begins anew, in front of the callbacks that may draw."""
        self._loaded, self._has_begun, self._is_read = None, False, False
        if stage != "fit":
            return
        forget_actions(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # Another list, because Lightning goes through the present one.
        trainer.callbacks = [self, *(one for one in callbacks if one is not self)]  # type: ignore[attr-defined]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the streams of all processes to the checkpoint."""
        if _validates_next(trainer):
            rank_zero_warn(
                "This checkpoint is written at a step behind which a validation is due. Lightning leaves the "
                "validation out of a run that resumes from here, and with it the random numbers of it, "
                "so dropout and other draws are not those of a run without a break. Resume from a checkpoint "
                "that is written behind the validation, as by a ModelCheckpoint without "
                "`every_n_train_steps`, or at another step."
            )
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["callbacks"][self.state_key] = {
            "ranks": Ranks.current().all_gather_object(_streams()),
            "is_inside_epoch": batches.current.ready > 0 and not batches.is_last_batch,
            "seed": os.environ.get(_SEED),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the streams until training is set up, which may draw from others."""
        self._loaded = state_dict or None
        if self._has_begun:  # strategies that divide the weights load a checkpoint late
            self._restore()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the streams back before Lightning begins a stream of data."""
        self._has_begun = True
        self._restore()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts them back for what other callbacks begin with, and arranges for the first batch."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        keeps_places = any(isinstance(callback, LoaderStateCallback) for callback in callbacks)
        if not keeps_places:  # which warns itself
            warn_of_reloading(trainer)
        if self._loaded is None:
            return
        _warn_of_other_seed(trainer, self._loaded.get("seed"))
        # Such a stream has begun with them, and may not begin twice.
        self._is_read = is_read_ahead(trainer) and not reads_anew(trainer) and not keeps_places
        is_inside = self._loaded["is_inside_epoch"]
        iterates = not keeps_places and not (is_inside and stateful_loaders(trainer))
        before_batches(trainer, lambda: self._begin(trainer, is_inside, iterates))
        if not self._is_read:
            self._restore()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts them back for an epoch that begins."""
        if not self._is_read:
            self._restore()
        self._loaded = None

    def _begin(self, trainer: pl.Trainer, is_inside: bool, iterates: bool) -> None:
        """Begin to read with the streams of the checkpoint; inside an epoch its order was drawn before."""
        if has_only_to_end(trainer):
            self._restore()
        elif not self._is_read:
            if not is_inside:
                self._restore()
            if iterates:
                iterate_once_more(trainer)
            if is_inside:
                self._restore()
        self._loaded = None

    def _restore(self) -> None:
        """Put the streams of this process to where they were in the checkpoint."""
        if self._loaded is None or not self._loaded["ranks"]:
            return
        ranks, stored = Ranks.current(), self._loaded["ranks"]
        if len(stored) == ranks.size:
            _put_back(stored[ranks.rank])
            return
        rank_zero_warn(
            f"The checkpoint holds the random streams of {len(stored)} processes, and the run resumes on "
            f"{ranks.size}, so dropout and other draws are not those of a run without a break."
        )
        self._loaded = self._loaded | {"ranks": []}


def _warn_of_other_seed(trainer: pl.Trainer, before: str | None) -> None:
    """Warn of an order of several processes, which Lightning draws from the seed of the run."""
    combined, now = trainer.fit_loop._combined_loader, os.environ.get(_SEED)
    samplers = [] if combined is None else [sampler_of(loader) for loader in combined.flattened]
    is_drawn = any(isinstance(sampler, DistributedSampler) and sampler.shuffle for sampler in samplers)
    if is_drawn and None not in (before, now) and before != now:
        rank_zero_warn(
            f"The run resumes with seed_everything({now}) in place of {before}. Lightning draws the order of "
            "several processes from it, so other batches are read than in a run without a break. Use "
            f"{before}."
        )


def _validates_next(trainer: pl.Trainer) -> bool:
    """Whether Lightning is at the end of a training batch behind which it validates."""
    epoch_loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    batches: Any = epoch_loop.batch_progress.current
    if fetcher is None or not batches.completed < batches.processed == batches.ready:
        return False
    return epoch_loop._should_check_val_fx(fetcher)


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
