"""Which rows of a source each rank has. Axes: `R` ranks, `n` rows of this rank, `N` rows of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ask_lightning.utilities.distributed import Ranks


@dataclass(frozen=True)
class Part:
    """The rows of a source that this rank has, of N rows that are dealt out to all ranks.

    Items of the source are dealt out in turn, as cards are: rank r has items r, r + R, … . A source that is
    sorted by length then gives every rank its share of long clips. Where ranks bring rows of their own number
    (an iterable source) they follow each other instead, rank by rank.

    Attributes:
        ranks: The processes.
        counts: Rows of each rank.
        at_a_time: How many rows an item is, where items are dealt out in turn; 0 where ranks follow each
            other.

    Examples:
        >>> part = Part.dealt(5, Ranks(rank=0, size=1))
        >>> part.rows().tolist(), part.total
        ([0, 1, 2, 3, 4], 5)
        >>> Part.dealt(5, Ranks(rank=1, size=2)).rows().tolist()
        [1, 3]
    """

    ranks: Ranks
    counts: tuple[int, ...]
    at_a_time: int

    @classmethod
    def dealt(cls, items: int, ranks: Ranks, at_a_time: int = 1) -> Part:
        """Each rank's share of a source of known length.

        Args:
            items: How many items the source has.
            ranks: The processes.
            at_a_time: How many rows each item is.
        """
        shares = (len(range(rank, items, ranks.size)) for rank in range(ranks.size))
        return cls(ranks, tuple(share * at_a_time for share in shares), at_a_time)

    @classmethod
    def brought(cls, counts: Sequence[int], ranks: Ranks) -> Part:
        """Parts of any size that follow each other.

        Args:
            counts: Rows of each rank.
            ranks: The processes.
        """
        return cls(ranks, tuple(counts), 0)

    @property
    def total(self) -> int:
        """N."""
        return sum(self.counts)

    def rows(self) -> Tensor:
        """Numbers in the source of this rank's rows, `(n,)`."""
        return self.numbers(torch.arange(self.counts[self.ranks.rank]))

    def numbers(self, local: Tensor) -> Tensor:
        """Numbers in the source of some of this rank's own rows."""
        if not self.at_a_time:
            return local + sum(self.counts[: self.ranks.rank])
        item = local // self.at_a_time * self.ranks.size + self.ranks.rank
        return item * self.at_a_time + local % self.at_a_time

    def locate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which rank has each of some rows of the source, and which of its own rows it is there."""
        if self.at_a_time:
            item = rows // self.at_a_time
            return item % self.ranks.size, item // self.ranks.size * self.at_a_time + rows % self.at_a_time
        counts = torch.tensor(self.counts, device=rows.device)
        owner = torch.searchsorted(counts.cumsum(0), rows, right=True)
        return owner, rows - (counts.cumsum(0) - counts)[owner]

    def whole(self, rows: Tensor) -> Tensor:
        """All ranks' rows in the order of the source; collective.

        Args:
            rows: `(n, ...)`, this rank's.

        Returns:
            `(N, ...)`, the same on every rank.
        """
        if self.ranks.size == 1:
            return rows
        parts = self.ranks.all_gather(rows, self.counts)
        if not self.at_a_time:
            return torch.cat(parts)
        whole = rows.new_empty((self.total, *rows.shape[1:]))
        items = whole.view(-1, self.at_a_time, *rows.shape[1:])
        for rank, part in enumerate(parts):
            items[rank :: self.ranks.size] = part.view(-1, *items.shape[1:])
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor `(N, ...)` that every rank has."""
        return whole if self.ranks.size == 1 else whole[self.rows().to(whole.device)]

    def fetch(self, wanted: Tensor, *sides: Tensor) -> list[Tensor]:
        """Vectors of any rows, from the ranks that have them; collective.

        Args:
            wanted: `(...)` int64, numbers in the source.
            sides: `(n, d)` each, this rank's rows of some tensors.

        Returns:
            For each side `(..., d)`.
        """
        flat = wanted.flatten()
        owner, local = self.locate(flat)
        if self.ranks.size == 1:
            return [side[local].view(*wanted.shape, side.shape[1]) for side in sides]
        # Ask each rank for its rows, in its order, and put the answers back into ours.
        order = owner.argsort(stable=True)
        asked = torch.bincount(owner, minlength=self.ranks.size).tolist()
        requests, asking = self.ranks.all_to_all(local[order], asked)
        found = []
        for side in sides:
            answers, _ = self.ranks.all_to_all(side[requests], asking, received_counts=asked)
            vectors = torch.empty_like(answers)
            vectors[order] = answers
            found.append(vectors.view(*wanted.shape, side.shape[1]))
        return found
