"""The probe: a few fixed validation pairs, encoded by the current encoders."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ask_lightning.encoding.encode import Embed, encode_source
from ask_lightning.encoding.encoders import Encoder, embed_batch, find_encoders
from ask_lightning.encoding.source_loader import has_index, source_loader
from ask_lightning.functional import unit_length
from ask_lightning.utilities.evenly_spaced import evenly_spaced


def select_probe(trainer: pl.Trainer, count: int) -> tuple[Subset[Any], DataLoader[Any]] | None:
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
    rows = evenly_spaced(size, count).tolist()
    return Subset(dataset, rows), loader


def check_encoders(
    module: pl.LightningModule, callback: Callback, audio: str | None, text: str | None
) -> None:
    """Refuse a model that does not have the methods that a callback calls.

    Args:
        module: The model, or the `ASKModule` around it, which knows its encoders.
        callback: The callback that calls them, for the message.
        audio: Name of the method that encodes audio. None: found as `find_encoders` does.
        text: Name of the method that encodes text. None: found as `find_encoders` does.

    Raises:
        ValueError: The model has no such method.
    """
    if not _knows_its_encoders(module, audio, text):
        find_encoders(module, audio, text, caller=type(callback).__name__)


def encode_probe(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    items: Subset[Any],
    loader: DataLoader[Any],
    audio: str | None,
    text: str | None,
) -> tuple[Tensor, Tensor]:
    """Encode a few items without changing the state of the run.

    Args:
        trainer: The running trainer.
        module: A model with the two methods, or the `ASKModule` around it, which knows its encoders.
        items: The items to encode.
        loader: A loader whose settings, such as the collate function, are used for the items.
        audio: Name of the module's method that takes a batch and returns audio embeddings. None: found as
            `find_encoders` does.
        text: Name of the module's method that returns text embeddings. None: found as `find_encoders` does.

    Returns:
        Audio and text embeddings, unit vectors `(n, d)`.
    """
    embed: Embed = (
        module.embed_pairs  # type: ignore[assignment]
        if _knows_its_encoders(module, audio, text)
        else _embed_by(module, *find_encoders(module, audio, text))
    )
    # The items are few, so every rank encodes all of them.
    encoded = encode_source(trainer, module, source_loader(items, loader), embed)
    return unit_length(encoded.audio), unit_length(encoded.text)


def _knows_its_encoders(module: pl.LightningModule, audio: str | None, text: str | None) -> bool:
    """Whether the module itself says how a batch is embedded, and nobody named methods."""
    return audio is None and text is None and callable(getattr(module, "embed_pairs", None))


def _embed_by(module: pl.LightningModule, audio: Encoder, text: Encoder) -> Embed:
    """A function that embeds batches of pairs without clip ids."""
    return lambda batch: (*embed_batch(module, audio, text, batch), None)
