"""Maximum inner product search. Axes: `B` queries, `N` rows, `K` neighbours, `d` width.

Every search returns rows ordered by (-score, row). Where rows tie for the last place, the exact searches
return the first of them; a Faiss index returns any.
"""

import sys
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.faiss_import import import_faiss

# Number of scores held at a time. A block of 4 MB stays in a CPU's cache between product and selection.
_SCORES_PER_BLOCK = 1 << 20
# So many times as large is a block on a GPU, where small ones cost more in launches than in work.
_GPU_BLOCK = 32
_QUERIES_PER_BLOCK = 1024
# Number of half-precision values converted at a time on a CPU: 1 MB of float32, which its product then finds
# in the cache (benchmarks/storage.py).
_VALUES_PER_CONVERSION = 1 << 18
# The same on a GPU, where few large products are faster: half a gigabyte of float32.
_GPU_VALUES_PER_CONVERSION = 1 << 27
# A product on a CPU rounds equal rows equally, in whatever block they stand, if their width is a multiple of
# this and there are at least so many; in float64 if the numbers of rows and of queries are multiples, too.
_EVEN = 4
# Faiss's kernel does not: this share of the largest score is more than what it rounds by.
_ROUNDING = 4e-6
# Number of queries from which on Faiss's kernel is faster than torch on a CPU (benchmarks/step.py).
_QUERIES_FOR_FAISS = 128
HALF = (torch.float16, torch.bfloat16)


class Search(Protocol):
    """Finds the rows with the largest inner products."""

    @property
    def kind(self) -> str:
        """How it searches: `"exact"`, or the description of a Faiss index."""
        ...

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search for the nearest rows.

        Args:
            queries: `(B, d)`.
            k: K in [1, N], the number of rows for each query.

        Returns:
            Scores `(B, K)` and row numbers `(B, K)`, ordered by (-score, row).
        """
        ...


class ExactSearch:
    """Exact search in torch: a blocked product and top-k.

    Scores are float64 for float64 vectors, else float32: vectors in half precision are converted block by
    block, and no copy of them is kept.

    Args:
        vectors: `(N, d)`, the rows to search.
    """

    kind = "exact"

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `Search` describes; memory is bounded by a block of scores and of converted rows."""
        if len(queries) <= _QUERIES_PER_BLOCK:
            return self._search(queries, k)
        found = [self._search(block, k) for block in queries.split(_QUERIES_PER_BLOCK)]
        scores, rows = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(rows)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search for one block of queries."""
        if len(queries) == 1:
            # A product with one vector rounds by where a row stands: equal rows would not tie.
            scores, rows = self._search(queries.expand(2, -1), k)
            return scores[:1], rows[:1]
        dtype = computation_dtype(self.vectors)
        queries = queries.to(dtype)
        num_scores = _SCORES_PER_BLOCK * (_GPU_BLOCK if queries.is_cuda else 1)
        height = num_scores // max(1, len(queries))
        if queries.is_cuda and self.vectors.dtype in HALF:
            height = min(height, _GPU_VALUES_PER_CONVERSION // self.vectors.shape[1])
        height = max(k, height)
        for first in range(0, max(1, len(self.vectors)), height):  # a rank may have no rows
            block = self.vectors[first : first + height]  # (height, d)
            block_scores = products(block, queries).T.contiguous()  # (B, height)
            block_rows = stable_topk(block_scores, min(k, block_scores.shape[1]))  # (B, k)
            best, best_rows = block_scores.gather(1, block_rows), block_rows + first  # (B, k)
            if first > 0:
                best, best_rows = torch.cat([scores, best], dim=1), torch.cat([rows, best_rows], dim=1)
            # Rows ascend from block to block and within each, so a stable sort orders ties by row.
            best, order = best.sort(dim=1, descending=True, stable=True)
            scores, rows = best[:, :k], best_rows.gather(1, order[:, :k])
        return scores, rows


def products(vectors: Tensor, queries: Tensor) -> Tensor:
    """Inner products of all vectors with all queries, in the dtype of the queries.

    Args:
        vectors: `(n, d)`; in half precision on a CPU they are converted a little at a time.
        queries: `(B, d)`, float32 or float64.

    Returns:
        `(n, B)`: tall times thin runs faster than thin times tall on a CPU.
    """
    rows = max(1, _VALUES_PER_CONVERSION // vectors.shape[1])
    if vectors.is_cpu and (missing := -vectors.shape[1] % _EVEN):
        vectors, queries = pad(vectors, (0, missing)), pad(queries, (0, missing))
    is_double = queries.dtype == torch.float64
    if vectors.is_cpu and (is_double or len(vectors) < _EVEN):
        even, others = (pad(side, (0, 0, 0, -len(side) % _EVEN)) for side in (vectors, queries))
        others = others if is_double else queries
        return (even.to(queries.dtype) @ others.T)[: len(vectors), : len(queries)]
    if vectors.dtype not in HALF or not vectors.is_cpu or len(vectors) <= rows:
        return vectors.to(queries.dtype) @ queries.T
    found = queries.new_empty(len(vectors), len(queries))
    converted = queries.new_empty(rows, vectors.shape[1])
    for first in range(0, len(vectors), rows):
        block = vectors[first : first + rows]
        converted[: len(block)] = block
        # Always of the whole buffer: a product of another height may round equal rows to unequal scores.
        found[first : first + rows] = (converted @ queries.T)[: len(block)]
    return found


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest scores of each row, ascending; of equal scores the first columns.

    `torch.topk` chooses arbitrarily among equal scores, and equal scores are common: a clip with five
    captions is five rows with one audio embedding.

    Args:
        scores: `(B, N)`.
        k: Number of columns to return for each row, in [1, N].

    Returns:
        `(B, k)`, int64.

    Examples:
        >>> stable_topk(torch.tensor([[1.0, 3.0, 1.0, 1.0]]), 2)
        tensor([[0, 1]])
    """
    width = scores.shape[1]
    largest, columns = scores.topk(min(k + 1, width), dim=1)
    kth = largest[:, k - 1 : k]
    # On a GPU, asking whether a tie crosses the boundary would wait for the device, and it would divide a
    # graph of `torch.compile`; the work is cheaper.
    asks = not (scores.is_cuda or torch.compiler.is_compiling())
    if width > k and not (asks and not bool((kth == largest[:, k:]).any())):
        position = torch.arange(width, 0, -1, dtype=torch.int32, device=scores.device)
        priority = torch.where(scores > kth, position + width, torch.where(scores == kth, position, 0))
        columns = priority.topk(k, dim=1).indices
    return columns[:, :k].sort(dim=1).values


class FastestExactSearch:
    """Exact search by torch for small batches of queries, by Faiss's kernel for large ones on a CPU.

    Faiss searches the vectors in place, without a copy. It does not order ties by row, and rounds the scores
    of equal rows unequally. So the rows that it finds are scored again, and queries with a tie for the last
    place, or one but for rounding, are searched again by torch.

    Args:
        vectors: `(N, d)`, float32 on a CPU.
    """

    kind = "exact"

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self._exact = ExactSearch(vectors)

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `Search` describes."""
        if len(queries) < _QUERIES_FOR_FAISS or k == len(self.vectors):
            return self._exact(queries, k)
        faiss = import_faiss()
        if sys.platform != "darwin":  # where `import_faiss` limits Faiss to one thread
            faiss.omp_set_num_threads(torch.get_num_threads())
        rows_of = (side.detach().float().contiguous().numpy() for side in (queries, self.vectors))
        found = faiss.knn(*rows_of, k + 1, metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = (torch.from_numpy(side) for side in found)  # (B, K + 1)
        tied = scores[:, k - 1] - scores[:, k] <= _ROUNDING * scores.abs().max()
        scores, rows = sort_candidates(self._scores_of(queries, rows[:, :k]), rows[:, :k])
        if bool(tied.any()):
            scores[tied], rows[tied] = self._exact(queries[tied], k)
        return scores, rows

    def _scores_of(self, queries: Tensor, rows: Tensor) -> Tensor:
        """Inner products `(B, K)` of queries `(B, d)` with rows `(B, K)` of each, equal for equal rows."""
        height = max(1, _SCORES_PER_BLOCK // (rows.shape[1] * self.vectors.shape[1]))
        blocks = zip(queries.float().split(height), rows.split(height), strict=True)
        return torch.cat([torch.linalg.vecdot(self.vectors[some], own[:, None]) for own, some in blocks])


def sort_candidates(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Order candidates by (-score, row).

    Args:
        scores: `(B, K)`.
        rows: `(B, K)`, their row numbers.

    Returns:
        Both, reordered.
    """
    rows, order = rows.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, rows.gather(1, order)
