"""`LossTerms`: the terms of each training step's loss in the log."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ask_lightning.encoding.target import find_target
from ask_lightning.losses.base import RetrievalLoss


class LossTerms(Callback):
    """Logs the terms of each training step's loss, as `ask/loss` and the like.

    For losses that need no knowledge: beside a `KnowledgeRefreshCallback`, which logs these terms itself, it
    does nothing.

    Requirements:
        An `ASKModule`, or a module that calls a loss of `ask_lightning.losses` itself.

    Raises:
        RuntimeError: At the start of `fit`, for a module without such a loss.

    Examples:
        >>> callbacks = [LossTerms()]  # of a Trainer whose module trains with an NTXentLoss
    """

    def __init__(self) -> None:
        self._loss: RetrievalLoss | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the loss of the module."""
        if stage == "fit":
            self._loss = find_target(pl_module).loss

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the step's loss."""
        assert self._loss is not None
        log_terms(trainer, pl_module, self._loss)


def log_terms(trainer: pl.Trainer, pl_module: pl.LightningModule, loss: RetrievalLoss) -> None:
    """Log the terms of a loss's last call, once.

    Args:
        trainer: The running trainer.
        pl_module: Its module.
        loss: The loss, whose terms are taken out of it.
    """
    terms, loss.last = loss.last, {}
    if terms and not trainer.barebones:
        pl_module.log_dict({f"ask/{name}": term.mean() for name, term in terms.items()}, batch_size=1)
