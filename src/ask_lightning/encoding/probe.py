"""The probe: a few fixed validation pairs, encoded by the current encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ask_lightning.encoding.encode import encode_source, has_index, source_loader
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.functional import unit_length


def probe_of_validation(trainer: pl.Trainer, count: int) -> tuple[Subset[Any], DataLoader[Any]] | None:
    """Select evenly spaced items of the first validation dataset.

    Args:
        trainer: The running trainer.
        count: Number of items; all items if there are fewer.

    Returns:
        The items and their validation loader; None if there is no validation dataset with an index.
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
        callback: The callback that needs the methods, for the message.
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
    loader: DataLoader[Any],
    audio: str,
    text: str,
) -> tuple[Tensor, Tensor]:
    """Encode a few items without changing the state of the run.

    Args:
        trainer: The running trainer.
        module: The model with the two methods.
        items: The items to encode.
        loader: A loader whose settings, such as the collate function, are used for the items.
        audio: Name of the module's method that takes a batch and returns audio embeddings.
        text: The same for text.

    Returns:
        Audio and text embeddings, unit vectors `(n, d)`.
    """
    methods: list[Callable[[Any], Any]] = [getattr(module, name) for name in (audio, text)]

    def embed(batch: Any) -> tuple[Tensor, Tensor, None]:
        sides = [
            as_embeddings(method(batch), name) for method, name in zip(methods, (audio, text), strict=True)
        ]
        return sides[0], sides[1], None

    # The items are few, so every rank encodes all of them.
    encoded = encode_source(trainer, module, source_loader(items, loader), embed)
    return unit_length(encoded.audio), unit_length(encoded.text)


def is_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether a callback is due after the epoch that ends: the first, the last, or every n-th epoch.

    Args:
        trainer: The running trainer.
        every_n_epochs: Number n of epochs.

    Returns:
        True if the callback is due.
    """
    ended = trainer.current_epoch + 1
    return ended == 1 or ended % every_n_epochs == 0 or ended == trainer.max_epochs
