"""Encoding the knowledge source: every row once, in order, with the current encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ask_lightning.encoding.isolation import isolated_from_training, preserved_dataset
from ask_lightning.encoding.lockstep import Lockstep
from ask_lightning.encoding.row_limit import RowLimit
from ask_lightning.encoding.sharding import (
    is_sharded,
    release_parameters,
    through_strategy,
    whole_parameters,
)
from ask_lightning.encoding.source_loader import has_index, items_per_batch, num_items, open_batches
from ask_lightning.functional import unit_length
from ask_lightning.interaction import pooled
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.row_files import ROWS_PER_BLOCK, PairFiles, PairWriter
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks

Embed = Callable[[Any], tuple[Any, ...]]
"""From a batch to audio `(B, d)`, text `(B, d)`, clip ids or `None`, and caption ids where there are any."""

# Embeddings of one pair in batches of other sizes differ by rounding only.
_SAME_ROW = 1e-4


@dataclass(frozen=True)
class Encoded:
    """What this rank encoded of a source.

    Attributes:
        audio: `(n, d)` float32, on the module's device; with `files` float16 unit vectors, mapped from there.
        text: `(n, d)`, the same of the text.
        ids: `(n,)` int64, the clip of each pair, or `None`.
        shard: Which rows of the source these are.
        files: The files that the rows were written to, if they were.
        caption_ids: `(n,)` int64, the caption of each pair, or `None`.
    """

    audio: Tensor
    text: Tensor
    ids: Tensor | None
    shard: RowShard
    files: PairFiles | None = None
    caption_ids: Tensor | None = None


@dataclass(frozen=True)
class _RankSummary:
    """What the other ranks have to know about the rows that a rank encoded.

    Attributes:
        num_rows: Number of rows.
        width: Width of the embeddings; `None` without a row.
        has_ids: Whether the rows have clip ids.
        has_caption_ids: Whether they have caption ids.
        num_items: Number of source items that the rows were made of; 0 if it is not known.
        rows_per_item: Rows that collation makes of every item; 0 if that varies, `None` without an item.
    """

    num_rows: int
    width: int | None
    has_ids: bool
    has_caption_ids: bool
    num_items: int
    rows_per_item: int | None


def encode_source(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Iterable[Any],
    embed: Embed,
    on_batch: Callable[[], object] = lambda: None,
    *,
    ranks: Ranks | None = None,
    limit: RowLimit | None = None,
    directory: Path | None = None,
) -> Encoded:
    """Embed every pair of a source, by the current encoders in evaluation mode.

    Batches pass through the trainer's precision plugin, the batch transfer hooks and the transfer to the
    device, as the trainer's own do. The hooks see a validation stage, so those that augment training batches
    leave them alone.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        loader: Batches of this rank's items of the source, in order, from `source_loader`.
        embed: Function from a batch to its embeddings and ids, see `Embed`.
        on_batch: Function to call after each batch, for a progress bar.
        ranks: The processes among which the source is divided, as for `source_loader`; then this is
            collective.
        limit: Number of rows to read on this rank at most, and when a stream counts as endless.
        directory: A directory into whose files each batch is written at once, so that memory never holds the
            source. Default: the embeddings stay in memory.

    Returns:
        This rank's embeddings, and which rows of the source they are.

    Raises:
        ValueError: The source yields no batch, or embeddings are not two equal `(B, d)`.
        OSError: The directory cannot be written to, or the disk is full.
        RuntimeError: Another rank failed, an iterable source yielded two ranks the same pairs, or a stream
            does not end.
    """
    ranks = ranks or Ranks()
    require_equal_weights(trainer, module, loader, ranks)
    # A rank that fails in a forward pass that needs all ranks cannot wait for the others, which wait for it.
    together = ranks if is_sharded(trainer) else Ranks()
    failing = (
        nullcontext() if together.size > 1 else ranks.all_or_none("encoding its part of the knowledge source")
    )
    with ranks.all_or_none("making the files of its part of the knowledge"):
        writer = None if directory is None else PairWriter(directory, _own_items(loader))
    with failing:
        batches = EncodedBatches(writer)
        _encode_batches(trainer, module, loader, embed, on_batch, limit or RowLimit(), batches, together)
    return assemble(batches, loader, module.device, ranks)


def require_equal_weights(
    trainer: pl.Trainer, module: pl.LightningModule, loader: Iterable[Any], ranks: Ranks
) -> None:
    """Refuse ranks that would encode by different weights, or sources of different lengths; collective.

    Args:
        trainer: The running trainer.
        module: The module that encodes.
        loader: Loader of this rank's items of the source.
        ranks: The processes among which the source is divided.

    Raises:
        RuntimeError: The ranks differ; the message lists what each has.
    """
    if ranks.size == 1:
        return
    release_parameters(module)  # those that a validation has left together
    whole = whole_parameters(trainer, module).values()
    weights = sum(checksum(weight) for weight in whole) % 2**64
    ranks.require_equal(
        (f"weights {weights:016x}", num_items(loader)),
        "the weights and the length of the knowledge source",
    )


def embed_source_batch(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, embed: Embed
) -> tuple[Any, ...]:
    """Move a batch of a source to the device as the trainer moves its own, and embed it.

    Args:
        trainer: The trainer.
        module: The module whose hooks see the batch.
        batch: The batch, as the loader yields it.
        embed: Function from a batch to its embeddings and ids.

    Returns:
        What `embed` returns.
    """
    moved = trainer.precision_plugin.convert_input(batch)
    moved = module._on_before_batch_transfer(moved, dataloader_idx=0)
    moved = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
    with trainer.precision_plugin.forward_context():
        return embed(moved)


def _encode_batches(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Iterable[Any],
    embed: Embed,
    on_batch: Callable[[], object],
    limit: RowLimit,
    encoded: EncodedBatches,
    together: Ranks,
) -> None:
    """Encode the source batch by batch; `together` are ranks in lockstep."""
    embed = through_strategy(trainer, module, embed)
    with (
        isolated_from_training(trainer, module),
        preserved_dataset(getattr(loader, "dataset", loader)),
        torch.no_grad(),
        open_batches(loader) as batches,
    ):
        steps = Lockstep(batches, together)
        for batch in steps:
            embedded = embed_source_batch(trainer, module, batch, embed)
            if not steps.is_own:
                continue
            try:
                encoded.add(embedded, loader, limit)
            except Exception as error:
                steps.fail(error)
                continue
            on_batch()
            if limit.is_reached:
                steps.finish()
        release_parameters(module)


class EncodedBatches:
    """The batches that a rank has encoded, in memory or in files.

    Args:
        writer: The files; None: they stay in memory.
    """

    def __init__(self, writer: PairWriter | None = None) -> None:
        self.writer = writer
        self.audio: list[Tensor] = []
        self.text: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.caption_ids: list[Tensor] = []
        self.sizes: list[int] = []
        self.width: int | None = None

    def add(self, embedded: tuple[Any, ...], loader: Iterable[Any], limit: RowLimit) -> None:
        """Take a batch, or as much of it as is wanted.

        Args:
            embedded: Audio embeddings, text embeddings, clip ids or `None`, and caption ids if there are any,
                as encoders return them.
            loader: The loader that the batch is from.
            limit: Number of rows to read at most, which counts these.

        Raises:
            ValueError: The embeddings are not two equal `(B, d)`, or the ids are of another number.
            RuntimeError: The source is a stream that does not end.
        """
        audio, text, ids, *captions = pooled(embedded[0]), pooled(embedded[1]), *embedded[2:]
        _check_batch(audio, text, ids, *captions)
        wanted = limit.add(len(audio), has_length=_has_length(loader))
        audio, text = audio[:wanted], text[:wanted]
        if ids is not None:
            self.ids.append(integer_ids(ids)[:wanted].cpu())
        if captions:
            self.caption_ids.append(integer_ids(captions[0], name="caption_ids")[:wanted].cpu())
        self.sizes.append(len(audio))
        self.width = audio.shape[1]
        if self.writer is not None:
            self.writer.append(audio, text)
            return
        # Copies, because a model may write its next outputs into the same memory (CUDA graphs, TensorRT).
        self.audio.append(audio.detach().to(torch.float32, copy=True))
        self.text.append(text.detach().to(torch.float32, copy=True))

    def finish(self, width: int, device: torch.device) -> tuple[Tensor, Tensor, PairFiles | None]:
        """All audio embeddings, all text embeddings, and their files; there may be no batch."""
        if self.writer is not None:
            files = self.writer.finish(width)
            return files.audio.mapped, files.text.mapped, files
        if self.audio:
            return torch.cat(self.audio), torch.cat(self.text), None
        audio, text = torch.empty(2, 0, width, device=device)
        return audio, text, None


def _own_items(loader: Iterable[Any]) -> int | None:
    """Number of items that a loader reads on this rank, if that is known."""
    try:
        return len(getattr(loader, "sampler", None) or ()) or None
    except TypeError:
        return None


def assemble(batches: EncodedBatches, loader: Iterable[Any], device: torch.device, ranks: Ranks) -> Encoded:
    """Concatenate the batches of this rank, and find their rows in the whole source; collective.

    Args:
        batches: What this rank has encoded, which may be nothing.
        loader: The loader that has been read.
        device: Device of the embeddings.
        ranks: The processes among which the source is divided.

    Returns:
        This rank's embeddings, and which rows of the source they are.

    Raises:
        ValueError: No rank has any row.
        RuntimeError: An iterable source yielded two ranks the same pairs.
    """
    batch_rows, batch_items, ids = batches.sizes, items_per_batch(loader), batches.ids
    own_ids = torch.cat(ids) if ids else None
    own_captions = torch.cat(batches.caption_ids) if batches.caption_ids else None
    own = _RankSummary(
        num_rows=sum(batch_rows),
        width=batches.width,
        has_ids=own_ids is not None,
        has_caption_ids=own_captions is not None,
        num_items=sum(batch_items),
        rows_per_item=_rows_per_item(batch_rows, batch_items, own_ids) if batch_items else None,
    )
    summaries: list[_RankSummary] = ranks.all_gather_object(own)
    if not any(summary.num_rows for summary in summaries):
        raise ValueError("The knowledge source is empty: it yielded no batch. Check `source`.")
    width = next(summary.width for summary in summaries if summary.width is not None)
    with ranks.all_or_none("writing its part of the knowledge"):
        own_audio, own_text, files = batches.finish(width, device)
    if not batch_rows and any(one.has_ids for one in summaries):  # fewer rows than ranks
        own_ids = torch.empty(0, dtype=torch.int64)
    if not batch_rows and any(one.has_caption_ids for one in summaries):
        own_captions = torch.empty(0, dtype=torch.int64)
    if ranks.size > 1 and not has_index(loader):
        _check_ranks_differ(own_audio, own_text, own_ids, ranks)
        if own_ids is not None:
            _warn_of_shared_pairs(own_audio, own_text, own_ids, ranks)
    shard = _shard_of(summaries, ranks)
    return Encoded(own_audio, own_text, own_ids, shard, files, own_captions)


def _shard_of(summaries: list[_RankSummary], ranks: Ranks) -> RowShard:
    """Interleaved where all items made the same number of rows, else contiguous."""
    per_item = {summary.rows_per_item for summary in summaries} - {None}
    if len(per_item) == 1 and (rows_per_item := per_item.pop()):
        return RowShard.interleaved(sum(summary.num_items for summary in summaries), ranks, rows_per_item)
    return RowShard.contiguous([summary.num_rows for summary in summaries], ranks)


def _rows_per_item(batch_rows: list[int], batch_items: list[int], ids: Tensor | None) -> int:
    """The number of rows that collation makes of every item, such as one for each caption; 0 if it varies."""
    average = sum(batch_rows) // sum(batch_items)
    if not average or batch_rows != [average * count for count in batch_items]:
        return 0
    # Three rows of one item and one of the next are two each on average.
    if ids is not None and bool((ids.view(-1, average) != ids[::average, None]).any()):
        return 0
    return average


def _check_ranks_differ(audio: Tensor, text: Tensor, ids: Tensor | None, ranks: Ranks) -> None:
    """Refuse an iterable source that yields two ranks the same pairs."""
    tensors = (audio, text) if ids is None else (audio, text, ids)
    # Rows that are all alike, as a head that starts from zeros makes them, say nothing about the source.
    is_varied = len(audio) > 0 and all(bool((side.amin(0) < side.amax(0)).any()) for side in (audio, text))
    contents = ranks.all_gather_object((len(audio), *map(checksum, tensors)) if is_varied else None)
    for rank, content in enumerate(contents):
        first = contents.index(content)
        if content is not None and first < rank:
            raise RuntimeError(
                f"Ranks {first} and {rank} read the same {content[0]} pairs of the knowledge source. A "
                "source without an index has to yield each rank its own items: take every "
                "`torch.distributed.get_world_size()`-th item from `torch.distributed.get_rank()` on in its "
                "`__iter__`, or pass a map-style Dataset, which is divided for you."
            )


def _warn_of_shared_pairs(audio: Tensor, text: Tensor, ids: Tensor, ranks: Ranks) -> None:
    """Warn of pairs with one id and the same embeddings that several ranks read."""
    # A few numbers of each row tell rows apart; captions of one clip differ in their texts.
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(audio.shape[1], generator=generator).to(audio.device)
    # Block by block: rows in files may be more than memory holds.
    marks = torch.stack(
        [
            torch.cat([unit_length(block.float()) @ line for block in side.split(ROWS_PER_BLOCK)])
            for side in (audio, text)
        ]
    ).cpu()  # (2, n)
    parts = ranks.all_gather_object((ids, marks))
    all_ids, all_marks = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
    readers = torch.cat([torch.full((len(part[0]),), rank) for rank, part in enumerate(parts)])
    by_text = all_marks[1].argsort(stable=True)
    order = by_text[all_ids[by_text].argsort(stable=True)]  # rows of a clip with one text follow each other
    all_ids, all_marks, readers = all_ids[order], all_marks[:, order], readers[order]
    is_alike = ((all_marks[:, 1:] - all_marks[:, :-1]).abs() < _SAME_ROW).all(dim=0)
    is_shared = (all_ids[1:] == all_ids[:-1]) & (readers[1:] != readers[:-1]) & is_alike
    # Where all embeddings are alike, as a head that starts from zeros makes them, they tell nothing.
    if (shared := int(is_shared.sum())) and all(bool(side.amin() < side.amax()) for side in all_marks):
        rank_zero_warn(
            f"{shared} of the {len(all_ids)} pairs of the knowledge source are read by several processes, so "
            "they are in the knowledge more than once. Give each process shards of its own, such as by "
            "WebDataset(..., nodesplitter=webdataset.split_by_node)."
        )


def _has_length(loader: Iterable[Any]) -> bool:
    """Whether a loader says how many batches it has."""
    try:
        len(loader)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _check_batch(audio: Tensor, text: Tensor, ids: Any, *captions: Any) -> None:
    """Refuse embeddings that are not two equal `(B, d)`, and ids of another number."""
    if audio.ndim != 2 or audio.shape != text.shape:
        raise ValueError(
            "The encoders have to return embeddings of the same shape (batch, width) for every batch of the "
            f"knowledge source, but returned audio {tuple(audio.shape)} and text {tuple(text.shape)}. "
            "Project both to one width, pool tokens, and do not squeeze a last batch of one. If the source "
            "is a list of samples, make batches of it: DataLoader(samples, batch_size)."
        )
    if ids is not None and len(ids) != len(audio):
        raise ValueError(f"There have to be {len(audio)} clip ids in this batch, but got {len(ids)}.")
    for caption_ids in captions:
        if (count := 0 if caption_ids is None else len(caption_ids)) != len(audio):
            raise ValueError(f"There have to be {len(audio)} caption ids in this batch, but got {count}.")
