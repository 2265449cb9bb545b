"""`RecallTable`: the recalls of a run as a row of the paper's tables."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from ask_lightning.callbacks.publish import output_folder, publish_table
from ask_lightning.metrics.table import CALIBRATED, mean_recall, percentages, score_table
from ask_lightning.utilities.text_tables import print_table


class RecallTable(Callback):
    """Prints and writes recalls in percent at the end of `fit`, `validate` and `test`.

    After `fit` there is a row for the best epoch on the validation data and a row for the last epoch; after
    `validate` and `test` there is one row for the split, and after a test with `SearchCalibration` a second
    one for calibrated search. The table is written to `recall.csv` in the folder of the run, and shown in
    Weights & Biases and TensorBoard.

    Requirements:
        A model that logs the scores of `ask_lightning.metrics.AudioTextRetrieval` under `val/` and `test/`,
        and the monitored metric.

    Args:
        monitor: Name of the logged metric whose highest value marks the best epoch; that of the trainer's
            `ModelCheckpoint`. None: the mean of all recalls that the model logs.

    Raises:
        RuntimeError: The model does not log the monitored metric.

    Examples:
        >>> RecallTable().best
        {}
    """

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor
        self._start_anew()

    def _start_anew(self) -> None:
        """Forgets the scores of a run."""
        self.best: dict[str, float] = {}
        self._best_value = 0.0
        self._best_epoch = -1
        self._last: dict[str, float] = {}
        self._last_epoch = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets an earlier run where a new one begins; a checkpoint is restored later."""
        if stage == "fit" and trainer.current_epoch == 0:
            self._start_anew()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the scores of the epoch; publishes them if validation was run on its own."""
        metrics = _logged_metrics(trainer)
        scores = percentages(metrics, "val/")
        if trainer.sanity_checking or not scores:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            _publish(trainer, {"validation": scores})
            return
        self._last, self._last_epoch = scores, trainer.current_epoch
        value = mean_recall(scores) if self.monitor is None else self._monitored(metrics)
        if not self.best or value > self._best_value:
            self.best, self._best_value, self._best_epoch = scores, value, trainer.current_epoch

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes the best and the last epoch."""
        if self._last:
            rows = {
                f"validation, best epoch ({self._best_epoch})": self.best,
                f"validation, last epoch ({self._last_epoch})": self._last,
            }
            _publish(trainer, rows)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes the scores of the test."""
        metrics = _logged_metrics(trainer)
        searches = {"test": "test/", "test, calibrated": f"test/{CALIBRATED}"}
        rows = {row: scores for row, prefix in searches.items() if (scores := percentages(metrics, prefix))}
        if rows:
            _publish(trainer, rows)

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"best": self.best, "value": self._best_value, "epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best epoch of an interrupted run."""
        self.best, self._best_epoch = state_dict["best"], state_dict["epoch"]
        self._best_value = state_dict["value"]

    def _monitored(self, metrics: dict[str, float]) -> float:
        if self.monitor not in metrics:
            logged = ", ".join(name for name in metrics if name.startswith("val/"))
            raise RuntimeError(
                f"The best epoch is chosen by {self.monitor!r}, which the model does not log; it logs "
                f"{logged}. Name one of these as `monitor`, of `ModelCheckpoint` as well."
            )
        return metrics[self.monitor]


def _logged_metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _publish(trainer: pl.Trainer, rows: dict[str, dict[str, float]]) -> None:
    """Print the table and publish it."""
    folder = output_folder(trainer)
    columns, cells = score_table(rows, "% of")
    if trainer.is_global_zero:
        print_table(columns, cells, float_format=".1f")
    publish_table(trainer, folder, "recall", columns, cells)
