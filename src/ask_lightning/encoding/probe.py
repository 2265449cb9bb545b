"""A few validation pairs, always the same, by the current encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ask_lightning.encoding.encode import encode_source
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.encoding.source_loader import has_index, source_loader
from ask_lightning.functional import unit_length


def probe_of_validation(trainer: pl.Trainer, count: int) -> tuple[Subset[Any], DataLoader[Any]] | None:
    """Evenly spaced items of the first validation dataset.

    Args:
        trainer: The running trainer.
        count: How many; all if there are fewer.

    Returns:
        The items and the trainer's loader for such; None if there is no dataset with an index.
    """
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    if not (isinstance(loader, DataLoader) and has_index(loader)):
        return None
    dataset: Dataset[Any] = loader.dataset
    size = len(dataset)  # type: ignore[arg-type]
    rows = torch.linspace(0, size - 1, min(count, size)).long().tolist()
    return Subset(dataset, rows), loader


def check_encoders(module: pl.LightningModule, callback: Callback, audio: str, text: str) -> None:
    """Refuse names that are no methods of the model.

    Args:
        module: The model.
        callback: Who will ask it for embeddings, for the message.
        audio: Name of the method that encodes audio.
        text: The same for text.

    Raises:
        ValueError: The model has no such method.
    """
    for argument, name in (("audio", audio), ("text", text)):
        if not callable(getattr(module, name, None)):
            raise ValueError(
                f"Argument `{argument}` of {type(callback).__name__} has to name a method of the model that "
                f"takes a batch, but {type(module).__name__} has no {name!r}."
            )


def encode_probe(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    items: Subset[Any],
    like: DataLoader[Any],
    audio: str,
    text: str,
) -> tuple[Tensor, Tensor]:
    """Encode a few items without a trace in the run.

    Args:
        trainer: The running trainer.
        module: With the two methods.
        items: What to encode.
        like: A loader with the collation for them.
        audio: Name of the module's method that takes a batch and returns audio embeddings.
        text: The same for text.

    Returns:
        Audio and text, `(n, d)` unit vectors each.
    """
    methods: list[Callable[[Any], Any]] = [getattr(module, name) for name in (audio, text)]

    def embed(batch: Any) -> tuple[Tensor, Tensor, None]:
        sides = [
            as_embeddings(method(batch), name) for method, name in zip(methods, (audio, text), strict=True)
        ]
        return sides[0], sides[1], None

    # Every rank encodes all of it: it is small.
    encoded = encode_source(trainer, module, source_loader(items, like), embed)
    return unit_length(encoded.audio), unit_length(encoded.text)


def is_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether the epoch that ends is the first, the last, or one of those between.

    Args:
        trainer: The running trainer.
        every_n_epochs: Distance of those between.
    """
    ended = trainer.current_epoch + 1
    return ended == 1 or ended % every_n_epochs == 0 or ended == trainer.max_epochs
