"""Batches that all ranks encode side by side, because each forward pass needs all of them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

from ask_lightning.utilities.distributed import Ranks

_NO_BATCH = object()


class Lockstep:
    """Iterates the batches of this rank, with as many steps on each rank as on the one with most batches.

    A rank that has no batch left gets one again that it had before; if it never had any, that of another
    rank. What comes of it is to be thrown away: `is_own` says so. With one process these are the batches.

    Args:
        batches: The batches of this rank.
        ranks: The processes that step together; all of them have to iterate.

    Attributes:
        is_own: Whether the present batch is one of this rank's own that it has not had before.

    Examples:
        >>> list(Lockstep(iter([1, 2]), Ranks()))
        [1, 2]
    """

    def __init__(self, batches: Iterator[Any], ranks: Ranks) -> None:
        self._batches, self._ranks = batches, ranks
        self._has_ended = False
        self._failure: Exception | None = None
        self.is_own = False

    def fail(self, error: Exception) -> None:
        """End the steps of all ranks at the next one, because of what came of this rank's batch.

        Args:
            error: What is raised on this rank, and told to the others.
        """
        self._failure = error

    def finish(self) -> None:
        """Read no further batch on this rank."""
        self._has_ended = True

    def __iter__(self) -> Iterator[Any]:
        """The batches.

        Raises:
            Exception: Reading a batch, or what was done with it, failed on this rank.
            RuntimeError: It failed on another rank.
        """
        batch = _NO_BATCH
        while True:
            read, failure = self._read()
            batch = batch if read is _NO_BATCH else read
            told = None if failure is None else f"{type(failure).__name__}: {failure}"
            states = self._ranks.all_gather_object((read is not _NO_BATCH, batch is _NO_BATCH, told))
            if failure is not None:
                raise failure
            for rank, (_, _, other) in enumerate(states):
                if other is not None:
                    raise RuntimeError(f"Rank {rank} failed while encoding the knowledge source. {other}")
            if not any(has_read for has_read, _, _ in states):
                return
            if any(has_none for _, has_none, _ in states):  # fewer batches than ranks
                batch = self._lend(batch, states.index(next(one for one in states if one[0])))
            self.is_own = read is not _NO_BATCH
            # Hooks may move the parts of what they get to other keys, and a rank may need the batch again.
            yield copy(batch) if self._ranks.size > 1 else batch

    def _read(self) -> tuple[Any, Exception | None]:
        """The next batch of this rank, or the error in which reading it ended."""
        if self._failure is not None or self._has_ended:
            return _NO_BATCH, self._failure
        try:
            read = next(self._batches, _NO_BATCH)
        except Exception as error:
            return _NO_BATCH, error
        self._has_ended = read is _NO_BATCH
        return read, None

    def _lend(self, batch: Any, lender: int) -> Any:
        """This rank's batch, or that of the lender if it has none."""
        lent = self._ranks.all_gather_object(batch if self._ranks.rank == lender else None)[lender]
        return lent if batch is _NO_BATCH else batch
