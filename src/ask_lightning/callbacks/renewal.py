"""New knowledge by the current encoders, of all rows of the source or of some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.callbacks.base_builder import BaseBuilder
from ask_lightning.callbacks.knowledge_files import rows_directory
from ask_lightning.callbacks.partial_refresh import (
    EncodedRows,
    PairMaps,
    encode_items,
    fit_maps,
    items_of,
    local_rows,
    overwrite,
    rolling_items,
    sample_items,
)
from ask_lightning.callbacks.progress import progress_bar
from ask_lightning.callbacks.refresh_options import mode_option
from ask_lightning.callbacks.refresh_source import SourceReader, num_batches
from ask_lightning.encoding.compatibility import warn_of_uneven_streams
from ask_lightning.encoding.encode import Encoded, encode_source
from ask_lightning.encoding.row_limit import RowLimit
from ask_lightning.encoding.source_loader import has_index
from ask_lightning.encoding.target import Target
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.mapping import MappedRefresh
from ask_lightning.knowledge.row_matching import agree
from ask_lightning.knowledge.snapshot_file import SnapshotError
from ask_lightning.utilities.distributed import Ranks


@dataclass(frozen=True)
class Renewal:
    """New knowledge, before it is put in place of the old.

    Attributes:
        base: The new base.
        rows: The rows that were encoded; `None` for all.
        has_same_rows: Whether they are those of the old base.
        report: What was measured beside it, for the log.
        num_in_vain: Number of pairs that were encoded for maps that turned out to be of no use.
    """

    base: KnowledgeBase
    rows: Tensor | None
    has_same_rows: bool
    report: dict[str, float] = field(default_factory=dict)
    num_in_vain: int = 0

    @property
    def num_renewed(self) -> int:
        """Number of rows that are new."""
        return len(self.base.fine) if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class Renewer:
    """Makes a `Renewal` of the knowledge; all methods are collective.

    Attributes:
        target: The loss that looks the knowledge up and the encoders.
        builder: What makes a base of embeddings.
        reader: What opens the source.
        mode: `"full"`, `"rolling"` or a `MappedRefresh`.
        period: T.
        finds_rows_for: The option that finds rows by their clip ids, as it is written; `None` without one.
        directory: The directory for files of rows; `None`: one in the run's own directory.
    """

    target: Target
    builder: BaseBuilder
    reader: SourceReader
    mode: str | MappedRefresh
    period: int | AutoPeriod
    finds_rows_for: str | None
    directory: str | Path | None

    @property
    def needs_training_clips(self) -> bool:
        """Whether the training clips are encoded beside the source."""
        loss = self.target.loss
        return self.reader.source is not None and loss.needs_training_clips and loss.reads_other_clips

    @property
    def num_neighbors(self) -> int:
        """K, the number of neighbours that the loss looks up."""
        return getattr(self.target.loss, "num_neighbors", 1)

    def open(self, trainer: pl.Trainer) -> tuple[list[Iterable[Any]], list[RowLimit]]:
        """Make loaders of this rank's items, and say what is read of them at most.

        Args:
            trainer: The running trainer.

        Returns:
            Loader and limit of the source and, where the loss learns from them, of the training clips.

        Raises:
            ValueError: An option needs an index that the source does not have.
        """
        with Ranks.current().all_or_none("opening the knowledge source"):
            loaders = [self.reader.open(trainer, self.num_neighbors)]
            self._check_index(loaders[0])
            if self.needs_training_clips:
                loaders.append(self.reader.open(trainer, self.num_neighbors, training_data=True))
            return loaders, self.reader.row_limits(trainer, self.num_neighbors, loaders)

    def check_restored(self, base: KnowledgeBase) -> None:
        """Refuse knowledge of an earlier run that lacks what this one looks up.

        Args:
            base: The base of a snapshot.

        Raises:
            SnapshotError: It lacks training clips, caption ids or prototypes, or has needless clips.
        """
        if self.needs_training_clips and base.training_clips is None:
            raise SnapshotError("It lacks the training clips, which the loss needs beside the source.")
        if base.training_clips is not None and not self.needs_training_clips:
            raise SnapshotError("It holds training clips beside its source, and none are asked for now.")
        finds_captions = self.finds_rows_for is not None and self.target.pair_ids is not None
        if finds_captions and base.training_clips is None and base.caption_ids is None:
            raise SnapshotError("It lacks the caption ids, by which rows are found now.")
        if self.target.loss.needs_prototypes and len(base.coarse) == 0:
            raise SnapshotError("It lacks prototypes, which the loss looks up.")

    def renew(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loaders: Sequence[Iterable[Any]],
        limits: Sequence[RowLimit],
        *,
        is_same_source: bool,
    ) -> Renewal:
        """Encode what the mode asks for and make a base of it.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            loaders: What `open` has returned.
            limits: The same.
            is_same_source: Whether the base in use is, as far as can be told without ids, of these rows.

        Raises:
            ValueError: The source is empty, or embeddings contain NaN or Inf.
            RuntimeError: The source is a stream that does not end, or an option cannot find its rows again.
        """
        old, some, maps = self.target.loss.knowledge, None, None
        if self.mode != "full" and old is not None:
            some = self._encode_some(trainer, module, loaders[0], old, is_same_source=is_same_source)
            if some is None:
                rank_zero_warn(
                    f"The knowledge source is another one than that of the {len(old.fine)} pairs in use (its "
                    "items, clips or captions differ), so all of it is encoded."
                )
            else:
                maps = self._fit_maps(old, some)
                if maps is None or maps.are_useful:
                    return self._with_rows(old, some, maps)
        with progress_bar(trainer, "Refreshing knowledge", num_batches(loaders)) as advance:
            encoded = [
                encode_source(
                    trainer,
                    module,
                    loader,
                    self.target.embed,
                    advance,
                    ranks=Ranks.current(),
                    limit=limit,
                    directory=self.rows_directory(trainer) if loader is loaders[0] else None,
                )
                for loader, limit in zip(loaders, limits, strict=True)
            ]
        renewal = self.of_encoded(trainer, module, loaders[0], encoded, is_same_source=is_same_source)
        if some is None or maps is None:
            return renewal
        return replace(renewal, report=maps.report(), num_in_vain=len(some.rows))

    def of_encoded(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loader: Iterable[Any],
        encoded: Sequence[Encoded],
        *,
        is_same_source: bool,
    ) -> Renewal:
        """Make a base of all rows of the source, which have been encoded.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            loader: The loader of the source.
            encoded: Its embeddings, and perhaps those of the training clips.
            is_same_source: Whether the base in use is, as far as can be told without ids, of these rows.

        Raises:
            ValueError: Embeddings contain NaN or Inf.
            RuntimeError: An option cannot find these rows again.
        """
        source, *of_training = encoded
        old = self.target.loss.knowledge
        self._check_rows(source)
        if self.reader.source is None and source.shard.ranks.size > 1 and not has_index(loader):
            warn_of_uneven_streams(trainer, source.shard.counts)
        clips = self.builder.training_clips(of_training[0], old) if of_training else None
        base = self.builder.of_source(
            source,
            clips,
            old,
            is_same_source=is_same_source,
            needs_prototypes=self.target.loss.needs_prototypes,
            directory=self.rows_directory(trainer),
            device=module.device,
        )
        has_same_rows = old is not None and has_index(loader) and base.has_same_rows_as(old)
        if has_same_rows and old is not None:
            has_same_rows = torch.equal(base.ids, old.ids) if source.ids is not None else is_same_source
            has_same_rows = has_same_rows and agree(base.caption_ids, old.caption_ids)
        return Renewal(base, None, has_same_rows)

    def rows_directory(self, trainer: pl.Trainer) -> Path | None:
        """Where the files of `storage="memmap"` go; `None` for other storages.

        Args:
            trainer: The running trainer.
        """
        return rows_directory(trainer, self.directory) if self.builder.storage == "memmap" else None

    def _encode_some(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loader: Iterable[Any],
        old: KnowledgeBase,
        *,
        is_same_source: bool,
    ) -> EncodedRows | None:
        """The rows of a base whose turn it is; `None` if the source is not that of the base."""
        max_items = self.reader.max_items(trainer, self.num_neighbors)
        num_items, rows_per_item = items_of(old, loader, max_items)
        if not rows_per_item or not is_same_source:
            return None
        epoch, seed = trainer.current_epoch, self.builder.seed
        if isinstance(self.mode, MappedRefresh):
            items = sample_items(num_items, self.mode.sample_share, epoch, seed)
        else:
            assert isinstance(self.period, int)
            items = rolling_items(num_items, self.period, epoch, seed)
        return encode_items(
            trainer,
            module,
            loader,
            items,
            self.target.embed,
            old,
            rows_per_item,
            ranks=Ranks.current(),
            progress=lambda count: progress_bar(trainer, "Refreshing knowledge", count),
        )

    def _fit_maps(self, old: KnowledgeBase, sample: EncodedRows) -> PairMaps | None:
        """The maps of the rows outside of a sample; `None` where they are kept as they are."""
        return fit_maps(old, sample, self.builder.seed) if isinstance(self.mode, MappedRefresh) else None

    def _with_rows(self, old: KnowledgeBase, encoded: EncodedRows, maps: PairMaps | None) -> Renewal:
        """A base with some rows replaced and the others mapped, and prototypes of all of them."""
        if len(encoded.rows) == 0:  # fewer items than T
            return Renewal(old, encoded.rows, True)
        audio, text, shard = local_rows(old, Ranks.current())
        if maps is not None:
            audio, text = maps(audio, text)
        overwrite(audio, text, shard, encoded)
        needs_prototypes = self.target.loss.needs_prototypes
        ids = shard.select(old.ids)
        captions = None if old.caption_ids is None else shard.select(old.caption_ids)
        base = self.builder.of_rows(
            audio, text, ids, captions, shard, None, old, needs_prototypes=needs_prototypes
        )
        return Renewal(base, encoded.rows, True, {} if maps is None else maps.report())

    def _check_index(self, loader: Iterable[Any]) -> None:
        """Refuse a source without the index that the options need."""
        momentum = self.builder.momentum
        if (momentum or self.mode != "full") and not has_index(loader):
            option = f"momentum={momentum}" if momentum else mode_option(self.mode)
            wants = "mixes" if momentum else "works on"
            name = "momentum" if momentum else "mode"
            raise ValueError(
                f"KnowledgeRefreshCallback({option}) {wants} old and new embeddings of the "
                f"same rows, but the source {type(getattr(loader, 'dataset', loader)).__name__} has no "
                f"index by which to find them. Pass a map-style dataset, or leave `{name}` out."
            )

    def _check_rows(self, encoded: Encoded) -> None:
        """Refuse a source whose rows the options cannot find again."""
        if encoded.ids is None and self.finds_rows_for is not None:
            raise RuntimeError(
                f"KnowledgeRefreshCallback({self.finds_rows_for}) finds the rows of a batch by their clip "
                "ids, but the pairs of the source have none. Pass them: ASKModule(..., ids=...)."
            )
        if self.mode != "full" and not encoded.shard.rows_per_item:
            raise RuntimeError(
                f"KnowledgeRefreshCallback({mode_option(self.mode)}) encodes some items of the source and "
                "replaces their rows, but the items do not all make the same number of rows. Let the dataset "
                'yield single pairs, or use mode="full".'
            )
