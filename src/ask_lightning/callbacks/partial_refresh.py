"""A refresh that encodes some rows of the source and keeps or maps the others.

Axes: `I` items of the source, `n` encoded rows, `N` rows of the base, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Subset

from ask_lightning.encoding.encode import Embed, encode_source
from ask_lightning.encoding.source_loader import num_items, source_loader
from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.embedding_checks import check_embeddings
from ask_lightning.knowledge.mapping import RowMap, choose_held_out, fit_row_map
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.dtypes import computation_dtype

# With fewer items the held-out part has too few neighbours to compare maps by.
_LEAST_SAMPLE = 100


@dataclass(frozen=True)
class EncodedRows:
    """Rows of a base as the present encoders embed them, the same on every rank.

    Attributes:
        rows: `(n,)` int64, their global numbers.
        audio: `(n, d)`, unit vectors.
        text: `(n, d)`, unit vectors.
        rows_per_item: Number of rows of each item.
    """

    rows: Tensor
    audio: Tensor
    text: Tensor
    rows_per_item: int


def rolling_items(num_items: int, period: int, epoch: int, seed: int) -> Tensor:
    """The items that a rolling refresh encodes in an epoch: in `period` epochs in a row each item once.

    Args:
        num_items: I, the number of items of the source.
        period: Number of epochs in which all items are encoded.
        epoch: Present epoch.
        seed: Seed of the order, which is the same in every round.

    Returns:
        Item numbers, ascending, int64; about I / `period` of them.

    Examples:
        >>> parts = [rolling_items(7, 3, epoch, seed=0) for epoch in range(3)]
        >>> [len(part) for part in parts], sorted(torch.cat(parts).tolist())
        ([3, 2, 2], [0, 1, 2, 3, 4, 5, 6])
    """
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    return order[epoch % period :: period].sort().values


def sample_items(num_items: int, share: float, epoch: int, seed: int) -> Tensor:
    """The items that a mapped refresh encodes in an epoch, another sample in each.

    Args:
        num_items: I, the number of items of the source.
        share: Share of the items, in (0, 1].
        epoch: Present epoch.
        seed: Seed of the samples.

    Returns:
        Item numbers, ascending, int64; at least a hundred, without which maps cannot be judged, or all.

    Examples:
        >>> [len(sample_items(count, 0.1, epoch=3, seed=0)) for count in (50, 500, 5000)]
        [50, 100, 500]
    """
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[: max(_LEAST_SAMPLE, round(share * num_items))].sort().values


def items_of(base: KnowledgeBase, loader: Iterable[Any], max_items: int | None) -> tuple[int, int]:
    """The number of items that a base was made of, and of the rows of each.

    Args:
        base: Base of a source whose items all make the same number of rows.
        loader: Loader of that source.
        max_items: Number of items that are read at most; None: all of them.

    Returns:
        Both numbers; zeros where the source has as many items now that the base cannot be of it.
    """
    items = num_items(loader) or 0
    items = items if max_items is None else min(items, max_items)
    rows = len(base.fine)
    return (items, rows // items) if items and rows % items == 0 else (0, 0)


def encode_items(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Iterable[Any],
    items: Tensor,
    embed: Embed,
    base: KnowledgeBase,
    rows_per_item: int,
    *,
    ranks: Ranks,
    progress: Callable[[int], Any],
) -> EncodedRows | None:
    """Embed some items of the source; collective.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        loader: Loader of the whole source, map-style, with batches.
        items: Numbers of the items, ascending.
        embed: Function from a batch to its audio embeddings, text embeddings and clip ids.
        base: The base that these items are in.
        rows_per_item: Number of rows of each item in it.
        ranks: The processes among which the items are divided.
        progress: Function from the number of batches to a context manager, which yields a function to call
            after each.

    Returns:
        The rows of all ranks; `None` if they are not those of the base: the source has changed.

    Raises:
        ValueError: Embeddings contain NaN or Inf.
    """
    if len(items) == 0:
        nothing = torch.empty(0, base.width)
        return EncodedRows(items, nothing, nothing, rows_per_item)
    dataset: Any = loader.dataset  # type: ignore[attr-defined]
    part: Any = source_loader(Subset(dataset, items.tolist()), loader, ranks=ranks)
    with progress(len(part)) as advance:
        encoded = encode_source(trainer, module, part, embed, advance, ranks=ranks)
    shard = encoded.shard
    if shard.rows_per_item != rows_per_item or encoded.audio.shape[1] != base.width:
        return None
    rows = (items[:, None] * rows_per_item + torch.arange(rows_per_item)).flatten().to(base.device)  # (n,)
    for ids, stored in ((encoded.ids, base.ids), (encoded.caption_ids, base.caption_ids)):
        if ids is None or stored is None:
            continue
        if not torch.equal(shard.gather(ids.to(base.device)), stored[rows]):
            return None
    check_embeddings(encoded.audio, encoded.text, shard)
    audio, text = (shard.gather(unit_length(side).to(base.device)) for side in (encoded.audio, encoded.text))
    return EncodedRows(rows, audio, text, rows_per_item)


@dataclass(frozen=True)
class PairMaps:
    """Maps of both modalities from the old rows to where the encoders have moved.

    Attributes:
        audio: The map of the audio rows.
        text: The map of the text rows.
    """

    audio: RowMap
    text: RowMap

    @property
    def are_useful(self) -> bool:
        """Whether both modalities follow their encoders; otherwise all rows have to be encoded."""
        return self.audio.is_useful and self.text.is_useful

    def __call__(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map the rows `(N, d)` of both modalities."""
        return self.audio(audio), self.text(text)

    def report(self) -> dict[str, float]:
        """The recalls of held-out neighbours, for the log."""
        return {
            "mapped_recall_audio": self.audio.recall,
            "mapped_recall_text": self.text.recall,
            "old_recall_audio": self.audio.old_recall,
            "old_recall_text": self.text.old_recall,
        }


def fit_maps(base: KnowledgeBase, encoded: EncodedRows, seed: int) -> PairMaps:
    """Fit the maps from a sample's stored rows to its encoded ones; collective where the base is sharded.

    Args:
        base: The knowledge in use.
        encoded: The sample of all ranks.
        seed: Seed of the choice of held-out rows.

    Returns:
        The maps, the same on every rank; of a sample that is too small to judge none is better.
    """
    stored = base.fine.pairs(encoded.rows)
    held_out = choose_held_out(len(encoded.rows), encoded.rows_per_item, seed)
    if not held_out.any():
        return PairMaps(RowMap(None, 0.0, 0.0), RowMap(None, 0.0, 0.0))
    sides = zip(stored, (encoded.audio, encoded.text), strict=True)
    ranks, maps = Ranks.current(), None
    if ranks.rank == 0:  # ranks would part for good if one of them rounded otherwise
        maps = PairMaps(*(fit_row_map(old, new, held_out) for old, new in sides))
    fitted: PairMaps = ranks.all_gather_object(maps)[0]
    return fitted


def local_rows(base: KnowledgeBase, ranks: Ranks) -> tuple[Tensor, Tensor, RowShard]:
    """Copies of the rows of a base that this rank makes a new base of.

    Args:
        base: A base, of which every rank holds all rows or a shard.
        ranks: The processes of the run.

    Returns:
        Audio and text `(N / R, d)`, float32 or float64, and which rows these are.
    """
    local = base.fine.local
    shard = base.fine.shard if base.is_sharded else RowShard.interleaved(len(base.fine), ranks)
    sides = (side if base.is_sharded else shard.select(side) for side in (local.audio, local.text))
    audio, text = (side.to(computation_dtype(side), copy=True) for side in sides)
    return audio, text, shard


def overwrite(audio: Tensor, text: Tensor, shard: RowShard, encoded: EncodedRows) -> None:
    """Put encoded rows in their places, as far as they are of this rank.

    Args:
        audio: This rank's audio rows, changed in place.
        text: This rank's text rows, changed in place.
        shard: Which rows these are.
        encoded: The encoded rows of all ranks.
    """
    owner, places = shard.locate(encoded.rows)
    is_own = owner == shard.ranks.rank
    audio[places[is_own]] = encoded.audio[is_own].to(audio)
    text[places[is_own]] = encoded.text[is_own].to(text)
