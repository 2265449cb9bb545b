"""What a task consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from ask_lightning.data import RetrievalDataModule
from ask_lightning.reproduce.comparison import Protocol


@dataclass(frozen=True)
class Task:
    """Data, a model and a schedule, which all losses of a comparison share.

    Attributes:
        name: Name of the task in texts and folders.
        make_data: Function from the seed of the batches to a data module. Worker processes get it by
            pickling, as they do `make_model`.
        make_model: Function from a learning rate to a new model.
        learning_rate: Learning rate that suits the model.
        max_epochs: Number of training epochs of each run.
        refresh: Arguments of `KnowledgeRefreshCallback`, with `"T"`.
        description: Further options that decide results, with values that JSON can hold.
    """

    name: str
    make_data: Callable[[int], RetrievalDataModule]
    make_model: Callable[[float], pl.LightningModule]
    learning_rate: float
    max_epochs: int
    refresh: Mapping[str, Any]
    description: Mapping[str, Any]

    def sizes(self) -> str:
        """The number of pairs of each part, for a reader."""
        datasets: Mapping[str, Any] = self.make_data(0).datasets
        return ", ".join(f"{len(pairs)} {split}" for split, pairs in datasets.items())

    def protocol(self) -> Protocol:
        """What the runs of a comparison on this task have in common."""
        options = {"task": self.name, "learning_rate": self.learning_rate, **self.refresh}
        return Protocol(self.make_data, self.max_epochs, description=options | dict(self.description))
