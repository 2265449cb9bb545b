"""Where the knowledge of `storage="memmap"` lies, and how a refresh mixes what is in files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor

from ask_lightning.callbacks.snapshots import local_path
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.row_files import ROWS_PER_BLOCK, PairFiles, PairWriter
from ask_lightning.knowledge.row_shard import RowShard


def rows_directory(trainer: pl.Trainer, given: str | os.PathLike[str] | None) -> Path:
    """The directory for the files of a run's knowledge; collective.

    Args:
        trainer: The running trainer.
        given: The directory that was asked for. None: `knowledge_rows` in the run's own directory.

    Raises:
        ValueError: The run's directory is not local.
    """
    if given is not None:
        return Path(given)
    root = local_path(trainer.log_dir or trainer.default_root_dir)
    if root is None:
        raise ValueError(
            'KnowledgeRefreshCallback(storage="memmap") keeps embeddings in local files, but the run\'s '
            f"directory {trainer.default_root_dir} is not local. Pass `storage_directory`."
        )
    return root / "knowledge_rows"


def mix_files(
    new: PairFiles,
    old: KnowledgeBase,
    shard: RowShard,
    directory: Path,
    mix: Callable[[Tensor, Tensor], Tensor],
) -> PairFiles:
    """New embeddings mixed with the old ones of the same rows, in files of their own; collective.

    Args:
        new: The files with the new embeddings of this rank.
        old: The base with the old ones.
        shard: Which rows the new ones are.
        directory: The directory of the files that are written.
        mix: Function from old and new rows `(n, d)` to what is stored.
    """
    rows = shard.global_rows().to(old.device)
    writer = PairWriter(directory, len(rows))
    # Every rank takes as many turns as the one with most rows, because reading old rows is collective.
    for first in range(0, max(shard.counts), ROWS_PER_BLOCK):
        block = slice(first, first + ROWS_PER_BLOCK)
        before = (side.cpu() for side in old.fine.pairs(rows[block]))
        now = (side.mapped[block].float() for side in new.sides)
        writer.append(*(mix(*sides) for sides in zip(before, now, strict=True)))
    return writer.finish(new.audio.shape[1])
