"""The terms of a loss in the log, on the steps at which somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer
from torch import Tensor

_PREFIX = "ask/"


def log_loss_terms(trainer: pl.Trainer, module: pl.LightningModule, terms: Mapping[str, Tensor]) -> None:
    """Log the mean of each term of a training step's loss as `ask/<name>`.

    Lightning hands on values of a step to loggers every `log_every_n_steps` steps, and each call of
    `log` takes time, so on other steps the terms are left out. They are logged at the last batch of an epoch
    as well, and at every step if a callback or a learning-rate schedule monitors one of them.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        terms: Terms of the loss by name, of any shape.
    """
    if terms and not trainer.barebones and _is_read(trainer):
        module.log_dict({_PREFIX + name: term.mean() for name, term in terms.items()}, batch_size=1)


def _is_read(trainer: pl.Trainer) -> bool:
    """Whether somebody reads what is logged in this step, or that cannot be told."""
    connector = getattr(trainer, "_logger_connector", None)
    if getattr(connector, "should_update_logs", True) or trainer.fast_dev_run or trainer.is_last_batch:  # type: ignore[attr-defined]
        return True
    monitors = [getattr(callback, "monitor", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    monitors += [schedule.monitor for schedule in trainer.lr_scheduler_configs]
    if any(str(name).startswith(_PREFIX) for name in monitors):
        return True
    # A step after which the time is over is handed on, but that is known only when it has ended.
    return any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
