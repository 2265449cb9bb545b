"""What a task consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

from ask_lightning.data import RetrievalDataModule
from ask_lightning.reproduce.comparison import Protocol
from ask_lightning.reproduce.data_checksum import data_checksum


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
        make_token_model: Function from `"prototypes"` or `"frames"` and a learning rate to a new model whose
            clips and captions are compared by their tokens so; None: the task has no such model.
        knowledge_sources: Other knowledge than the training pairs, by its name in tables: functions that
            make a dataset for `KnowledgeRefreshCallback(source=...)`, which worker processes get by pickling.
        transfer: Other domains to test on without training there, by name: functions from the seed of the
            batches to a data module with a test part.
        accelerator: Accelerator of the trainer.
        trainer_options: Further arguments of the `Trainer` that trains, with values that JSON can hold.
        prepare: Function that makes the files which all runs read, such as pretrained weights, and calls its
            argument with a line about each. Runs would make them at first use; made beforehand, no run waits
            for another one.
    """

    name: str
    make_data: Callable[[int], RetrievalDataModule]
    make_model: Callable[[float], pl.LightningModule]
    learning_rate: float
    max_epochs: int
    refresh: Mapping[str, Any]
    description: Mapping[str, Any]
    make_token_model: Callable[[str, float], pl.LightningModule] | None = None
    knowledge_sources: Mapping[str, Callable[[], Dataset[Any]]] = field(default_factory=dict)
    transfer: Mapping[str, Callable[[int], RetrievalDataModule]] = field(default_factory=dict)
    accelerator: str = "cpu"
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Callable[[str], object]], object] | None = None

    def prepare_runs(self, threads: int, log: Callable[[str], object]) -> None:
        """Make the files that all runs read, if there are any, with as many threads as a run has.

        Args:
            threads: Number of CPU threads of each run: another number rounds otherwise.
            log: Function that is called with a line about each file.
        """
        if self.prepare is None:
            return
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self.prepare(log)
        finally:
            torch.set_num_threads(before)

    def sizes(self) -> str:
        """The number of pairs of each part, for a reader."""
        datasets: Mapping[str, Any] = self.make_data(0).datasets
        return ", ".join(f"{len(pairs)} {split}" for split, pairs in datasets.items())

    def protocol(self) -> Protocol:
        """What the runs of a comparison on this task have in common, a checksum of the data among it."""
        data = data_checksum(self.make_data(0).datasets)
        options = {"task": self.name, "data": data, "learning_rate": self.learning_rate, **self.refresh}
        return Protocol(
            self.make_data,
            self.max_epochs,
            accelerator=self.accelerator,
            trainer_options=self.trainer_options,
            description=options | dict(self.description),
        )
