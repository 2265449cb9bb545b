"""`RecallTable`: the recalls of a run as a row of the paper's tables."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from ask_lightning.callbacks.publish import Cell, output_folder, publish_table
from ask_lightning.metrics.table import COLUMNS, percentages, scores_markdown


class RecallTable(Callback):
    """Prints and writes recalls in percent at the end of a run, of a validation and of a test.

    After `fit` there is a row for the epoch with the highest mean recall on the validation data and one for
    the last; after `validate` and `test` one for the split. The table is `recall.csv` in the folder of the
    run, and in Weights & Biases and TensorBoard.

    Requirements:
        A model that logs what `ask_lightning.metrics.retrieval_metrics` computes, under `val/` and `test/`.

    Examples:
        >>> RecallTable().best
        {}
    """

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self._best_epoch = -1
        self._last: dict[str, float] = {}
        self._last_epoch = -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the epoch, or publishes where validation was all there was to do."""
        scores = percentages(_metrics(trainer), "val/")
        if trainer.sanity_checking or not scores:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            _publish(trainer, {"validation": scores})
            return
        self._last, self._last_epoch = scores, trainer.current_epoch
        if not self.best or _mean(scores) > _mean(self.best):
            self.best, self._best_epoch = scores, trainer.current_epoch

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes the best and the last epoch."""
        if self._last:
            rows = {
                f"validation, best epoch ({self._best_epoch})": self.best,
                f"validation, last epoch ({self._last_epoch})": self._last,
            }
            _publish(trainer, rows)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Publishes the test."""
        if scores := percentages(_metrics(trainer), "test/"):
            _publish(trainer, {"test": scores})

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"best": self.best, "epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best epoch of an interrupted run."""
        self.best, self._best_epoch = state_dict["best"], state_dict["epoch"]


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _mean(scores: dict[str, float]) -> float:
    recalls = [value for name, value in scores.items() if "recall_at" in name]
    return sum(recalls) / len(recalls) if recalls else 0.0


def _publish(trainer: pl.Trainer, rows: dict[str, dict[str, float]]) -> None:
    folder = output_folder(trainer)
    if trainer.is_global_zero:
        print(f"\n{scores_markdown(rows)}\n")
    names = [name for name in COLUMNS if all(name in scores for scores in rows.values())]
    cells: list[list[Cell]] = [[row, *(scores[name] for name in names)] for row, scores in rows.items()]
    publish_table(trainer, folder, "recall", ["% of", *(COLUMNS[name] for name in names)], cells)
