"""Search among rows that lie in a file: an index in memory proposes rows, the file decides among them.

Axes: `B` queries, `N` rows, `K` neighbours, `C` candidates, `d` width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ask_lightning.knowledge.exact_search import ExactSearch, sort_candidates
from ask_lightning.knowledge.faiss_search import TrainedIndex, fill_index
from ask_lightning.knowledge.row_files import RowFile

# Up to this many rows, reading all of them for a batch takes less than a tenth of a second.
_ROWS_SEARCHED_EXACTLY = 50_000
# Values of a row that one four-bit code stands for; two codes are a byte.
_VALUES_PER_CODE = 4
_CANDIDATES_PER_NEIGHBOR, _FEWEST_CANDIDATES = 10, 100
_QUERIES_PER_BLOCK = 64
# Faiss wants 39 rows for each centroid; more make training longer and the lists hardly better.
_ROWS_PER_CENTROID, _FEWEST_TRAINING_ROWS = 50, 1 << 15
# Number of rows that may have changed since the index was built; they are looked at one by one.
_MOST_CHANGED = 50_000


def index_for_file(num_rows: int, width: int) -> str:
    """The index that `"auto"` stands for among rows in a file.

    Args:
        num_rows: N.
        width: d.

    Returns:
        `"exact"` for few rows. Else an inverted file with the largest power of two up to √N as its number of
        lists, and product quantisation to half a byte for each four values, in a layout that is scanned fast.

    Examples:
        >>> index_for_file(10_000_000, 512), index_for_file(20_000, 512)
        ('IVF2048,PQ128x4fs', 'exact')
    """
    if num_rows <= _ROWS_SEARCHED_EXACTLY:
        return "exact"
    lists = 1 << (int(num_rows**0.5).bit_length() - 1)
    codes = next(count for count in range(max(1, width // _VALUES_PER_CODE), 0, -1) if width % count == 0)
    return f"IVF{lists},PQ{codes}x4fs"


class FileSearch:
    """Searches rows in a file by an index that fits into memory.

    The index, of any kind that Faiss knows, proposes 10 K rows for each query, but at least 100. Their scores
    are computed from the rows in the file, so that they are exact. A query for which the index finds fewer
    than K rows is searched again among all rows.

    Args:
        file: The rows.
        index: `"auto"` (see `index_for_file`), `"exact"`, which reads the whole file for each batch, or a
            Faiss factory string with optional `;parameter=value`.
        trained: What an earlier index has learnt; it is used again where it describes these rows well.

    Attributes:
        kind: The description of the index, `"exact"` if there is none.
        trained: What this index has learnt, for the one after it; `None` where there is nothing to learn.

    Raises:
        ImportError: Faiss is needed and cannot be loaded.
        ValueError: Faiss cannot make or search such an index.
    """

    def __init__(self, file: RowFile, index: str, trained: TrainedIndex | None = None) -> None:
        self.file = file
        self.kind = index_for_file(*file.shape) if index == "auto" else index
        self.trained: TrainedIndex | None = None
        self._index: Any = None
        self._changed = torch.empty(0, dtype=torch.int64)
        if self.kind != "exact":
            self._build(trained)

    def _build(self, trained: TrainedIndex | None) -> None:
        """Make the index of the present rows."""
        self._index, self.trained = fill_index(
            self.kind, self.file.shape[1], self._sample(), self._blocks(), len(self.file), trained
        )
        self._changed = self._changed[:0]

    def _blocks(self) -> Iterator[Tensor]:
        for _, block in self.file.blocks():
            yield block.float()

    def _sample(self) -> Tensor:
        """Evenly drawn rows `(n, d)` to learn from."""
        lists = re.search(r"IVF(\d+)", self.kind)
        wanted = max(_FEWEST_TRAINING_ROWS, _ROWS_PER_CENTROID * int(lists[1]) if lists else 0)
        if wanted >= len(self.file):
            return torch.cat(list(self._blocks()))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(len(self.file), (wanted,), generator=generator).sort().values
        return self.file.read(rows).float()

    def note_changed(self, rows: Tensor) -> None:
        """Take note of rows that were written after the index was built.

        Args:
            rows: `(n,)` int64, on the CPU.
        """
        self._changed = torch.cat([self._changed, rows]).unique()

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `Search` describes; scores and rows are on the device of the queries."""
        if len(self._changed) > _MOST_CHANGED and self._index is not None:
            self._build(self.trained)
        own = queries.detach().to("cpu", torch.float32)
        if self._index is None:
            scores, rows = ExactSearch(self.file.mapped)(own, k)
        else:
            found = [self._search(block.contiguous(), k) for block in own.split(_QUERIES_PER_BLOCK)]
            scores, rows = (torch.cat(side) for side in zip(*found, strict=True))
        return scores.to(queries.device), rows.to(queries.device)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search for one block of queries by the index."""
        count = min(max(_CANDIDATES_PER_NEIGHBOR * k, _FEWEST_CANDIDATES), len(self.file))
        _, proposed = self._index.search(queries.numpy(), count)
        candidates = torch.from_numpy(proposed)  # (B, C), -1 where nothing was found
        # The index may know rows that have changed as they were.
        candidates = candidates.masked_fill(torch.isin(candidates, self._changed), -1)
        scores = torch.einsum("bd,bcd->bc", queries, self._read(candidates.clamp(min=0)))
        scores = scores.masked_fill(candidates < 0, -torch.inf)
        if len(self._changed):
            changed = ExactSearch(self.file.read(self._changed))
            changed_scores, places = changed(queries, min(k, len(self._changed)))
            scores = torch.cat([scores, changed_scores], dim=1)
            candidates = torch.cat([candidates, self._changed[places]], dim=1)
        scores, rows = sort_candidates(scores, candidates)
        scores, rows = scores[:, :k], rows[:, :k]
        incomplete = (rows < 0).any(dim=1)
        if bool(incomplete.any()):
            scores[incomplete], rows[incomplete] = ExactSearch(self.file.mapped)(queries[incomplete], k)
        return scores, rows

    def _read(self, rows: Tensor) -> Tensor:
        """Rows `(B, C, d)` in float32, each read once."""
        unique, place = rows.unique(return_inverse=True)
        return self.file.read(unique).float()[place]
