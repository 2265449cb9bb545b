"""One training run of a comparison: train, keep the best epoch on validation, evaluate it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from ask_lightning.data import RetrievalDataModule
from ask_lightning.encoding.encoders import find_interaction
from ask_lightning.reproduce.evaluation import (
    EmbeddedPart,
    Metrics,
    embed_loader,
    evaluate,
    evaluate_uncalibrated,
    recalls_of,
)

ModuleAndCallbacks = tuple[pl.LightningModule, list[Callback]]


class _LogEveryEpoch(Callback):
    """Lets epochs of few steps log their steps at least once."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        every: Any = trainer
        every.log_every_n_steps = min(every.log_every_n_steps, int(trainer.num_training_batches))


def train_and_evaluate(
    build: Callable[[], ModuleAndCallbacks],
    data: RetrievalDataModule,
    *,
    seed: int,
    folder: Path,
    max_epochs: int,
    accelerator: str = "cpu",
    trainer_options: Mapping[str, Any] = MappingProxyType({}),
    loggers: Sequence[Logger] = (),
    calibrated: bool = True,
) -> Metrics:
    """Train a model from the weights of a seed, and evaluate the epoch with the best mean validation recall.

    A model whose attribute `interaction` is an `Interaction` is ranked by it; others by cosine similarity,
    and in calibrated search as well.

    Args:
        build: A function that makes the module and its callbacks. It is called after seeding, so that a seed
            gives every method the same weights. The module logs the mean of its validation recalls as
            `val/mean_recall`.
        data: Data module with training, validation and test datasets.
        seed: Seed of weights and dropout; `data` has a seed of its own for the batches.
        folder: Folder of the run's logs and checkpoint.
        max_epochs: Number of training epochs.
        accelerator: Accelerator of the trainer.
        trainer_options: Further arguments of the `Trainer` that trains, such as `gradient_clip_val`.
        loggers: Loggers besides the CSV logger.
        calibrated: Whether to evaluate calibrated search as well.

    Returns:
        Metrics of the best epoch's weights.
    """
    pl.seed_everything(seed, verbose=False)
    module, callbacks = build()
    best = ModelCheckpoint(
        folder,
        "best",
        monitor="val/mean_recall",
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=max_epochs,
        callbacks=[*callbacks, best, _LogEveryEpoch()],
        logger=[CSVLogger(folder.parent, folder.name, version=""), *loggers],
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        **trainer_options,
    )
    trainer.fit(module, datamodule=data)
    _load_weights(module, Path(best.best_model_path))
    evaluator = _make_evaluator(accelerator)

    def embedded(split: str) -> EmbeddedPart:
        return embed_loader(evaluator, module, data.ordered_dataloader(split))

    interaction = find_interaction(module)
    if interaction is not None or not calibrated:
        return evaluate_uncalibrated(embedded("val"), embedded("test"), interaction)
    return evaluate(embedded("val"), embedded("test"), embedded("train"))


def recalls_elsewhere(
    build: Callable[[], ModuleAndCallbacks],
    data: RetrievalDataModule,
    *,
    folder: Path,
    accelerator: str = "cpu",
) -> dict[str, float]:
    """Test the best epoch of a finished run on other data.

    Args:
        build: The function that the run was built by.
        data: Data module with a test dataset.
        folder: Folder of the run.
        accelerator: Accelerator of the trainer.

    Returns:
        Recalls under the names in `RECALLS`, as fractions.
    """
    module, _ = build()
    _load_weights(module, folder / "best.ckpt")
    part = embed_loader(_make_evaluator(accelerator), module, data.ordered_dataloader("test"))
    return recalls_of(part, find_interaction(module))


def _load_weights(module: pl.LightningModule, checkpoint: Path) -> None:
    module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])


def _make_evaluator(accelerator: str) -> pl.Trainer:
    """A trainer that embeds without a trace."""
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def silence_lightning() -> None:
    """Silence what Lightning reports about devices, loaders and folders in every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for message in ("does not have many workers", "exists and is not empty", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{message}.*")
