"""The start of an epoch: checkpoints that are written there, and what a resumed run does there once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl


def begin_epoch_with_all_batches(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Let a run that is resumed at the start of an epoch train on all of its batches.

    Until the first batch Lightning counts those of the epoch before, and stores that count, so a resumed run
    would leave out as many batches of the new epoch.

    Args:
        trainer: The running trainer.
        checkpoint: The checkpoint that is written; left alone anywhere else than at the start of an epoch.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.total
    if epochs.ready == epochs.started:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False


class _BeforeBatches:
    """Stands in once for Lightning's function that is called behind all hooks, before the first batch."""

    def __init__(self, epoch_loop: Any) -> None:
        self.actions: list[Callable[[], None]] = []
        self._epoch_loop = epoch_loop

    def __call__(self, fetcher: Any) -> None:
        del self._epoch_loop.__dict__["on_run_start"]
        for action in self.actions:
            action()
        self._epoch_loop.on_run_start(fetcher)


def before_batches(trainer: pl.Trainer, action: Callable[[], None]) -> None:
    """Do something once behind the hooks that start the first epoch of a run, before its first batch.

    Args:
        trainer: The trainer at `on_train_start`.
        action: What is done, behind earlier ones.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.__dict__.setdefault("on_run_start", _BeforeBatches(epoch_loop)).actions.append(action)


def forget_actions(trainer: pl.Trainer) -> None:
    """Leave out what was to be done before the batches of a run that was broken off.

    Args:
        trainer: The trainer.
    """
    trainer.fit_loop.epoch_loop.__dict__.pop("on_run_start", None)
