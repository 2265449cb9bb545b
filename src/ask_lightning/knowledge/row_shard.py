"""How the rows of a table are divided among ranks.

A *global* row number counts in the whole table, a *local* one among the rows of one rank.

Axes: `R` ranks, `n` rows of this rank, `N` rows of the table, `d` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ask_lightning.knowledge.row_files import RowFile
from ask_lightning.utilities.distributed import Ranks


@dataclass(frozen=True)
class RowShard:
    """The rows of a table that this rank holds, as one shard of the N rows that all ranks hold.

    An *interleaved* table has the items r, r + R, r + 2R, … of its source on rank r, so that a source that is
    sorted by length gives every rank its share of long clips. A *contiguous* table has the rows of rank 0
    first, then those of rank 1, and so on.

    Attributes:
        ranks: The processes that hold the table.
        counts: Number of rows of each rank.
        rows_per_item: Number of rows that each source item contributes to an interleaved table; 0 for a
            contiguous one.

    Examples:
        >>> RowShard.interleaved(5, Ranks(rank=1, size=2)).global_rows().tolist()
        [1, 3]
        >>> RowShard.contiguous([2, 3], Ranks(rank=1, size=2)).global_rows().tolist()
        [2, 3, 4]
    """

    ranks: Ranks
    counts: tuple[int, ...]
    rows_per_item: int

    @classmethod
    def interleaved(cls, num_items: int, ranks: Ranks, rows_per_item: int = 1) -> RowShard:
        """The shard of a source whose items go to the ranks in turn.

        Args:
            num_items: Number of items of the source.
            ranks: The processes that hold the table.
            rows_per_item: Number of rows that each item contributes.
        """
        items = (len(range(rank, num_items, ranks.size)) for rank in range(ranks.size))
        return cls(ranks, tuple(count * rows_per_item for count in items), rows_per_item)

    @classmethod
    def contiguous(cls, counts: Sequence[int], ranks: Ranks) -> RowShard:
        """The shard of a table that holds the rows of one rank after those of another.

        Args:
            counts: Number of rows of each rank.
            ranks: The processes that hold the table.
        """
        return cls(ranks, tuple(counts), 0)

    @classmethod
    def unsharded(cls, num_rows: int) -> RowShard:
        """All rows of a table that this process holds alone.

        Args:
            num_rows: N.
        """
        return cls.interleaved(num_rows, Ranks())

    @property
    def num_rows(self) -> int:
        """N, the number of rows of the whole table."""
        return sum(self.counts)

    @property
    def num_local_rows(self) -> int:
        """The number n of rows that this rank holds."""
        return self.counts[self.ranks.rank]

    def global_rows(self) -> Tensor:
        """Global numbers `(n,)` of this rank's rows, in their local order."""
        return self.to_global(torch.arange(self.num_local_rows))

    def to_global(self, local: Tensor) -> Tensor:
        """Translate local row numbers of this rank to global ones.

        Args:
            local: Integers of any shape.
        """
        if not self.rows_per_item:
            return local + sum(self.counts[: self.ranks.rank])
        item = local // self.rows_per_item * self.ranks.size + self.ranks.rank
        return item * self.rows_per_item + local % self.rows_per_item

    def locate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Find the rank that holds each row and the row's local number there.

        Args:
            rows: Global row numbers of any shape.

        Returns:
            Ranks and local row numbers, both in the shape of `rows`.
        """
        if self.rows_per_item:
            item = rows // self.rows_per_item
            local = item // self.ranks.size * self.rows_per_item + rows % self.rows_per_item
            return item % self.ranks.size, local
        counts = torch.tensor(self.counts, device=rows.device)
        owner = torch.searchsorted(counts.cumsum(0), rows, right=True)
        return owner, rows - (counts.cumsum(0) - counts)[owner]

    def select(self, table: Tensor) -> Tensor:
        """Take this rank's rows out of a table that every rank has as a whole.

        Args:
            table: `(N, ...)`.

        Returns:
            `(n, ...)`.
        """
        return table if self.ranks.size == 1 else table[self.global_rows().to(table.device)]

    def gather(self, local: Tensor) -> Tensor:
        """Put the whole table together on every rank; collective.

        Args:
            local: `(n, ...)`, the rows of this rank.

        Returns:
            `(N, ...)` in global order.
        """
        if self.ranks.size == 1:
            return local
        blocks = self.ranks.all_gather(local, self.counts)
        if not self.rows_per_item:
            return torch.cat(blocks)
        table = local.new_empty((self.num_rows, *local.shape[1:]))
        items = table.view(-1, self.rows_per_item, *local.shape[1:])
        for rank, block in enumerate(blocks):
            items[rank :: self.ranks.size] = block.view(-1, *items.shape[1:])
        return table

    def fetch(self, rows: Tensor, *tables: Tensor) -> list[Tensor]:
        """Read any rows of some tables from the ranks that hold them; collective.

        Args:
            rows: Global row numbers `(...)`, int64. Each rank may ask for other rows.
            tables: The local rows `(n, d)` of each table.

        Returns:
            The rows `(..., d)` of each table.
        """
        flat = rows.flatten()
        owner, local = self.locate(flat)
        if self.ranks.size == 1:
            return [
                table[local.to(table.device)].to(rows.device).view(*rows.shape, table.shape[1])
                for table in tables
            ]
        # Requests go out sorted by rank; the answers return in that order and are put back into ours.
        order = owner.argsort(stable=True)
        request_counts = torch.bincount(owner, minlength=self.ranks.size).tolist()
        requested, requested_counts = self.ranks.all_to_all(local[order], request_counts)
        fetched = []
        for table in tables:
            answers, _ = self.ranks.all_to_all(
                table[requested.to(table.device)].to(rows.device),
                requested_counts,
                received_counts=request_counts,
            )
            vectors = torch.empty_like(answers)
            vectors[order] = answers
            fetched.append(vectors.view(*rows.shape, table.shape[1]))
        return fetched


@dataclass(frozen=True)
class ShardedRows:
    """One table of vectors of which each rank holds a shard.

    Attributes:
        local: `(n, d)`, the rows of this rank.
        shard: Which rows of the table these are.
        file: The file that `local` is mapped from, if it is.
        on: The device on which rows of a file are computed with and exchanged between ranks.

    Examples:
        >>> rows = ShardedRows.unsharded(torch.eye(3))
        >>> rows.fetch(torch.tensor([2]))
        tensor([[0., 0., 1.]])
    """

    local: Tensor
    shard: RowShard
    file: RowFile | None = None
    on: torch.device | str = "cpu"

    @property
    def device(self) -> torch.device:
        """The device on which the rows are computed with."""
        return self.local.device if self.file is None else torch.device(self.on)

    @classmethod
    def unsharded(cls, table: Tensor) -> ShardedRows:
        """A table `(N, d)` that this process holds alone."""
        return cls(table, RowShard.unsharded(len(table)))

    def fetch(self, rows: Tensor) -> Tensor:
        """Read rows `(..., d)` by their global numbers `(...)`; collective."""
        (vectors,) = self.shard.fetch(rows, self.local)
        return vectors

    def blocks(self) -> Iterator[Tensor]:
        """The rows of this rank in order: as one block, or in float32 blocks if they lie in a file.

        There is a block, of no rows, on a rank that has none, too.
        """
        if self.file is None:
            yield self.local
        elif len(self.file) == 0:
            yield self.local.to(self.on).float()
        else:
            for _, block in self.file.blocks():
                yield block.to(self.on).float()

    def select(self, rows: Tensor) -> ShardedRows:
        """A table of some of the rows, each of which stays on its rank; collective.

        Args:
            rows: `(m,)` global row numbers, each once and the same on every rank.
        """
        owner, local = self.shard.locate(rows)
        own = local[owner == self.shard.ranks.rank].sort().values
        if self.file is None:
            chosen = self.local[own.to(self.device)]
        else:
            chosen = self.file.read(own).to(self.on).float()
        counts = self.shard.ranks.all_gather_object(len(own))
        return ShardedRows(chosen, RowShard.contiguous(counts, self.shard.ranks))
