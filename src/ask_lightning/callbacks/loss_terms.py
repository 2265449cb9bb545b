"""The terms of a loss in the log, on the steps at which somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

_PREFIX = "ask/"
# Attributes of an entry of the log: the value by which it is known as ours, and whether it was warned of.
_OWN, _TOLD = "_ask_value", "_ask_has_warned"


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
        log_own(trainer, module, {name: term.mean() for name, term in terms.items()})


def log_own(
    trainer: pl.Trainer, module: pl.LightningModule, values: Mapping[str, Tensor | float], **settings: Any
) -> None:
    """Log values as `ask/<name>`, and warn once of each name that the model or another callback logs as well.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        values: Values by name.
        settings: Arguments of `LightningModule.log_dict`.
    """
    named = {_PREFIX + name: value for name, value in values.items()}
    _warn_of_others(trainer, named)
    module.log_dict(named, batch_size=1, **settings)
    for entry in _entries(trainer):
        if entry.meta.name in named:
            # Lightning averages what is logged by one name in one hook: another tensor tells that it did.
            vars(entry)[_OWN] = entry.value


def _warn_of_others(trainer: pl.Trainer, named: Mapping[str, object]) -> None:
    """Warn of entries of the log that others have made under one of these names, or have changed."""
    for entry in _entries(trainer):
        if _OWN in vars(entry):
            is_mixed = entry.value is not vars(entry)[_OWN] and not entry.has_reset
        else:
            is_mixed = entry.meta.name in named
        if is_mixed and not vars(entry).get(_TOLD):
            vars(entry)[_TOLD] = True
            rank_zero_warn(
                f"`{entry.meta.name}` is logged in `{entry.meta.fx}` by the model or by a callback, and by "
                "ASK under the same name, so the log holds a mixture of both. Log yours under another name."
            )


def _entries(trainer: pl.Trainer) -> list[Any]:
    """The entries of the log under ASK's prefix."""
    results = getattr(trainer, "_results", None) or {}
    return [entry for entry in results.values() if entry.meta.name.startswith(_PREFIX)]


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
