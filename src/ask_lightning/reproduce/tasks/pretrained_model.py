"""A model that NT-Xent trains before losses are compared, so that all of them start from something useful."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ask_lightning.data import RetrievalDataModule
from ask_lightning.encoding.isolation import preserved_random_state
from ask_lightning.losses import NTXentLoss
from ask_lightning.module import ASKModule
from ask_lightning.reproduce.data_checksum import data_checksum
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.file_lock import file_lock

Log = Callable[[str], object]

_TEMPERATURE = 0.1
# What some models compare tokens by. It is not pretrained.
_INTERACTION = "interaction"


@dataclass(frozen=True)
class PretrainedModel:
    """Makes models with pretrained weights, which are in a file that is written once.

    Whichever process needs the file first writes it, others wait. The random streams of the process stay as
    they are. It trains with the threads that the process has, and another number rounds otherwise: call
    `prepare` before there are worker processes, or give all the same number.

    Attributes:
        kind: Class of the model, or a `functools.partial` of it, which takes `learning_rate` and, for models
            of tokens, `interaction`.
        make_data: Function from the seed of the batches to a data module with training pairs.
        learning_rate: Learning rate of the pretraining.
        epochs: Number of epochs of pretraining; with 0 a model keeps the weights that it is made with.
        seed: Seed of the first weights and of the batches.
        folder: Folder of the file.
        accelerator: Accelerator of the trainer.
        options: Whatever else decides the weights, with values that JSON can hold: there is a file for each
            set of options.
        trainer_options: Further arguments of the `Trainer` that pretrains. What decides them is among
            `options`.

    Raises:
        ValueError: The number of epochs or the seed is negative.
    """

    kind: Callable[..., pl.LightningModule]
    make_data: Callable[[int], RetrievalDataModule]
    learning_rate: float
    epochs: int
    seed: int
    folder: Path
    accelerator: str
    options: Mapping[str, Any]
    trainer_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count("pretraining_epochs", self.epochs, 0)
        check_count("pretraining_seed", self.seed, 0)

    @cached_property
    def path(self) -> Path:
        """The file of the weights, which is another one for other training pairs."""
        # Weights that other data made may have seen clips that are in the test part now.
        data = data_checksum({"train": self.make_data(self.seed).datasets["train"]})
        own = {"learning_rate": self.learning_rate, "epochs": self.epochs, "seed": self.seed, "data": data}
        text = json.dumps({**own, "temperature": _TEMPERATURE, **self.options}, sort_keys=True, default=str)
        return self.folder / f"pretrained-{blake2b(text.encode(), digest_size=6).hexdigest()}.pt"

    def make_model(self, learning_rate: float) -> pl.LightningModule:
        """Make a model.

        Args:
            learning_rate: Learning rate of the model.
        """
        return self._pretrained(self.kind(learning_rate=learning_rate))

    def make_token_model(self, interaction: str, learning_rate: float) -> pl.LightningModule:
        """Make a model that compares clips and captions by their tokens.

        The encoders are pretrained as those of `make_model`; weights of the interaction are random.

        Args:
            interaction: `"prototypes"` or `"frames"`.
            learning_rate: Learning rate of the model.
        """
        return self._pretrained(self.kind(learning_rate=learning_rate, interaction=interaction))

    def prepare(self, log: Log) -> None:
        """Pretrain, unless there is nothing to do or somebody has done it.

        Args:
            log: Function that is called with a line about the pretraining.
        """
        if not self.epochs or self.path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.path.with_suffix(".lock")):
            if not self.path.exists():
                started = time.perf_counter()
                self._train()
                seconds = time.perf_counter() - started
                log(f"Pretrained with NT-Xent for {self.epochs} epochs ({seconds:.0f} s)")

    def _pretrained(self, model: pl.LightningModule) -> pl.LightningModule:
        """A new model with the pretrained weights."""
        if self.epochs:
            self.prepare(log=lambda line: None)
            own = {
                name: values for name, values in model.state_dict().items() if _INTERACTION in name.split(".")
            }
            model.load_state_dict(own | torch.load(self.path, map_location="cpu", weights_only=True))
        return model

    def _train(self) -> None:
        if self.accelerator != "cpu" and torch.cuda.is_available():
            torch.cuda.init()  # or the state of its generators would not be preserved
        with preserved_random_state():
            torch.manual_seed(self.seed)
            model = self.kind(learning_rate=self.learning_rate)
            trainer = pl.Trainer(
                accelerator=self.accelerator,
                devices=1,
                max_epochs=self.epochs,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=sys.stdout.isatty(),
                enable_model_summary=False,
                **self.trainer_options,
            )
            module = ASKModule(model, NTXentLoss(temperature=_TEMPERATURE))
            trainer.fit(module, self.make_data(self.seed).train_dataloader())
        with atomic_write(self.path) as temporary:
            torch.save(model.cpu().state_dict(), temporary)
