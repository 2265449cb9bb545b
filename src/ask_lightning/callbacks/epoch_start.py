"""Checkpoints that are written at the start of an epoch, such as by an error in a refresh."""

from __future__ import annotations

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
