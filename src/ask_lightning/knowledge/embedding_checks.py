"""Embeddings of which no knowledge can be made. Axes: `n` rows of this rank, `N` rows, `d` width."""

from __future__ import annotations

from warnings import warn

import torch
from torch import Tensor

from ask_lightning.knowledge.row_shard import RowShard, ShardedRows
from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.non_finite import NonFiniteEmbeddingsError

_ROWS_NAMED_IN_AN_ERROR = 5


def check_embeddings(audio: Tensor, text: Tensor, shard: RowShard) -> None:
    """Refuse embeddings of which no knowledge can be made, and warn of zero rows; collective.

    Args:
        audio: `(n, d)`, this rank's audio embeddings.
        text: `(n, d)`, this rank's text embeddings.
        shard: Which rows of the source these are.

    Raises:
        ValueError: Shapes that are not two equal `(n, d)`, no rows on any rank, or (with the rows) NaN, Inf
            or a length that overflows.
    """
    shapes = (tuple(audio.shape), tuple(text.shape))
    shapes_of_ranks = shard.ranks.all_gather_object(shapes)
    width = shapes_of_ranks[0][0][1:]
    for audio_shape, text_shape in shapes_of_ranks:
        if len(audio_shape) != 2 or audio_shape != text_shape or audio_shape[1:] != width:
            raise ValueError(
                "Arguments `audio` and `text` have to be of the same shape (pairs, width), "
                f"but got {audio_shape} and {text_shape}."
            )
    check_rows(ShardedRows(audio, shard), ShardedRows(text, shard), stacklevel=4)


def check_rows(audio: ShardedRows, text: ShardedRows, *, stacklevel: int = 3) -> None:
    """Refuse tables with NaN or Inf or without rows, and warn of zero rows; collective.

    A row counts by its length: one so long that it overflows could not be brought to unit length.

    Args:
        audio: The audio rows.
        text: The text rows.
        stacklevel: How far up the caller of the warning is.

    Raises:
        ValueError: There are no rows on any rank, or NaN or Inf (with the rows).
    """
    shard = audio.shard
    if shard.num_rows == 0:
        raise ValueError("The knowledge source is empty: it yielded no audio–text pair.")
    for name, side in (("audio", audio), ("text", text)):
        broken, zero, first = [torch.empty(0, dtype=torch.int64)], 0, 0
        for block in side.blocks():
            lengths = row_lengths(block)
            broken.append((~lengths.isfinite()).nonzero().flatten().cpu() + first)
            zero += int((lengths == 0).sum())
            first += len(block)
        reports = shard.ranks.all_gather_object((shard.to_global(torch.cat(broken)).tolist(), zero))
        rows = sorted(row for numbers, _ in reports for row in numbers)
        if rows:
            shown = ", ".join(map(str, rows[:_ROWS_NAMED_IN_AN_ERROR]))
            raise NonFiniteEmbeddingsError(
                f"The {name} embeddings of {len(rows)} of {shard.num_rows} source rows contain NaN or Inf "
                f"(rows {shown}{', …' if len(rows) > _ROWS_NAMED_IN_AN_ERROR else ''}). "
                "Check these items of the knowledge source and the encoder's numerical range."
            )
        if shard.ranks.rank == 0 and (zeros := sum(count for _, count in reports)):
            warn(
                f"The {name} embeddings of {zeros} of {shard.num_rows} source rows are all zero; they stay "
                "zero and are similar to nothing.",
                stacklevel=stacklevel,  # the caller of `from_embeddings`
            )


def row_lengths(rows: Tensor) -> Tensor:
    """The lengths `(n,)` of rows `(n, d)`, as they are divided by; not finite where they overflow.

    Args:
        rows: The rows, of any floating dtype.
    """
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=computation_dtype(rows))
    return lengths
