"""How many rows a refresh reads of a source, and when a stream counts as endless."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

# From so many rows on a stream without a length is reported, each time that it has doubled.
_ROWS_WITHOUT_A_WORD = 100_000
# A longer stream has to be asked for by `max_rows`.
_MOST_ROWS = 2_000_000


@dataclass
class RowLimit:
    """Counts the rows of a source without a length on one rank.

    Attributes:
        take: Number of rows after which reading ends; `None` for no such end.
        batches: Number of batches after which reading ends; `None` for no such end.
        visited: Number of rows that training visits on this rank; infinite where that is not known.
        count: Number of rows that have been read.
    """

    take: int | None = None
    batches: int | None = None
    visited: float = math.inf
    count: int = 0
    _batches_read: int = field(default=0, repr=False)
    _reported: int = field(default=0, repr=False)

    def add(self, rows: int, *, has_length: bool) -> int:
        """Count the rows of a batch.

        Args:
            rows: Number of rows of the batch.
            has_length: Whether it is known that the source ends.

        Returns:
            How many of these rows are wanted; if they are fewer than there are, reading ends.

        Raises:
            RuntimeError: A source without a length has yielded more than training can use.
        """
        wanted = rows if self.take is None else min(rows, self.take - self.count)
        self.count += wanted
        self._batches_read += 1
        if has_length or self.take is not None or self.batches is not None:
            return wanted
        if self.count > max(_ROWS_WITHOUT_A_WORD, min(self.visited, _MOST_ROWS)):
            use = f", while training visits {self.visited:,.0f}" if self.visited < math.inf else ""
            raise RuntimeError(
                f"The knowledge source has yielded {self.count:,} pairs and has not ended{use}: it may "
                "be a stream without an end. Pass the pairs that shall be the knowledge: "
                "KnowledgeRefreshCallback(source=dataset), or max_rows=N for the first N of the stream."
            )
        if self.count >= max(2 * self._reported, _ROWS_WITHOUT_A_WORD):
            self._reported = self.count
            rank_zero_warn(
                f"The knowledge source has no length; {self.count:,} pairs have been read so far. If it has "
                "no end, pass KnowledgeRefreshCallback(source=dataset), or max_rows=N for the first N pairs."
            )
        return wanted

    @property
    def is_reached(self) -> bool:
        """Whether no further row is wanted."""
        has_rows = self.take is not None and self.count >= self.take
        return has_rows or (self.batches is not None and self._batches_read >= self.batches)


def rows_of_an_epoch(trainer: pl.Trainer, batch_size: int | None) -> float:
    """Number of training rows that this rank visits in an epoch, or in the whole run if that is less.

    Args:
        trainer: The running trainer.
        batch_size: Number of rows of a training batch; with `None` the result is infinite.
    """
    if batch_size is None:
        return math.inf
    batches = float(trainer.num_training_batches)
    if trainer.max_steps >= 0:
        batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
    return batches * batch_size


def limiting_option(trainer: pl.Trainer, *, is_training_data: bool) -> str | None:
    """The trainer's option that limits how much of a source a refresh reads, with its value.

    Args:
        trainer: The running trainer.
        is_training_data: Whether the source is the trainer's training data.

    Returns:
        The option; `None` if it reads everything.
    """
    if fast := trainer.fast_dev_run:  # type: ignore[attr-defined]
        return f"fast_dev_run={fast}"
    limit = trainer.limit_train_batches
    if is_training_data and (isinstance(limit, int) or limit < 1.0):  # 1 is one batch, 1.0 is all
        return f"limit_train_batches={limit}"
    return None
