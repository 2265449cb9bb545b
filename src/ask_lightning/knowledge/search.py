"""Maximum inner product search. Axes: `B` queries, `N` rows, `K` neighbours, `d` width.

Every search returns rows ordered by (-score, row). Where rows tie for the last place, the exact searches
return the first of them; a Faiss index returns any.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.faiss_import import faiss_has_gpu, faiss_is_available, import_faiss

# Number of scores held at a time. A block of 4 MB stays in a CPU's cache between product and selection.
_SCORES_PER_BLOCK = 1 << 20
_QUERIES_PER_BLOCK = 1024
# Number of queries from which on Faiss's kernel is faster than torch on a CPU (benchmarks/step.py).
_QUERIES_FOR_FAISS = 128
# Share of an inverted file's lists that is visited unless the index string sets `nprobe`.
_DEFAULT_PROBED_SHARE = 1 / 16
_GPU_SCRATCH_BYTES = 256 << 20
# Rows that a Faiss index takes at a time, of which a float32 copy is held.
_ROWS_PER_ADDITION = 1 << 16
# Rows from which an index learns its lists or ranges, and rows for each list if that is more.
_TRAINING_ROWS = 1 << 18
_TRAINING_ROWS_PER_LIST = 64
# Storage in half precision saves memory, which the float32 copy in a Faiss index would take again.
_HALF = (torch.float16, torch.bfloat16)


class Search(Protocol):
    """Finds the rows with the largest inner products."""

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search for the nearest rows.

        Args:
            queries: `(B, d)`.
            k: K in [1, N], the number of rows for each query.

        Returns:
            Scores `(B, K)` and row numbers `(B, K)`, ordered by (-score, row).
        """
        ...


def build_search(vectors: Tensor, index: str) -> Search:
    """Build a search over vectors.

    Args:
        vectors: `(N, d)`, on the device on which queries will be.
        index: `"exact"`; or a Faiss factory string, optionally with search parameters behind a semicolon
            (`"IVF1024,Flat;nprobe=64"`, `"HNSW32;efSearch=128"`); or `"auto"`: Faiss on the GPU if both
            the vectors and Faiss are on one, exact in torch for vectors in half precision, and else exact by
            torch or Faiss, whichever is faster. Any Faiss index that is not compressed (as `"SQfp16"` is)
            holds a float32 copy of the vectors.

    Returns:
        The search.

    Raises:
        ImportError: `index` asks for Faiss, which cannot be loaded.
        ValueError: Faiss does not understand `index`.
    """
    if index == "auto" and vectors.is_cuda and faiss_has_gpu() and vectors.dtype not in _HALF:
        index = "Flat"
    if index == "auto":
        # Faiss's kernel takes float32 on a CPU only.
        suitable = faiss_is_available() and vectors.is_cpu and vectors.dtype == torch.float32
        return FastestExactSearch(vectors) if suitable else ExactSearch(vectors)
    return ExactSearch(vectors) if index == "exact" else FaissSearch(vectors, index)


class ExactSearch:
    """Exact search in torch: a blocked product and top-k.

    Scores are float64 for float64 vectors, else float32: vectors in half precision are converted block by
    block.

    Args:
        vectors: `(N, d)`, the rows to search.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `Search` describes; memory is bounded by a block of scores, whatever B and N are."""
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
        scores = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        height = max(k, _SCORES_PER_BLOCK // max(1, len(queries)))
        for first in range(0, len(self.vectors), height):
            block = self.vectors[first : first + height].to(dtype)  # (height, d)
            # Tall times thin runs faster than thin times tall on a CPU.
            block_scores = (block @ queries.T).T.contiguous()  # (B, height)
            block_rows = stable_topk(block_scores, min(k, len(block)))  # (B, k)
            # Rows ascend from block to block and within each, so a stable sort orders ties by row.
            scores = torch.cat([scores, block_scores.gather(1, block_rows)], dim=1)
            rows = torch.cat([rows, block_rows + first], dim=1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            scores, rows = scores[:, :k], rows.gather(1, order[:, :k])
        return scores, rows


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
    # On a GPU, asking whether a tie crosses the boundary would wait for the device; the work is cheaper.
    if width > k and (scores.is_cuda or bool((kth == largest[:, k:]).any())):
        position = torch.arange(width, 0, -1, dtype=torch.int32, device=scores.device)
        priority = torch.where(scores > kth, position + width, torch.where(scores == kth, position, 0))
        columns = priority.topk(k, dim=1).indices
    return columns[:, :k].sort(dim=1).values


class FastestExactSearch:
    """Exact search by torch for small batches of queries, by Faiss's kernel for large ones on a CPU.

    Faiss searches the vectors in place, without a copy. It does not order ties by row, so queries with a tie
    for the last place are searched again by torch.

    Args:
        vectors: `(N, d)`, float32 on a CPU.
    """

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
        tied = scores[:, k - 1] == scores[:, k]
        scores, rows = sort_candidates(scores[:, :k], rows[:, :k])
        if bool(tied.any()):
            scores[tied], rows[tied] = self._exact(queries[tied], k)
        return scores, rows


def _training_rows(index: Any, vectors: Tensor) -> Tensor:
    """Evenly spaced rows from which an index learns, all unless there are many."""
    inverted_file = import_faiss().try_extract_index_ivf(index)
    lists = 0 if inverted_file is None else inverted_file.nlist
    count = max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * lists)
    if len(vectors) <= count:
        return vectors
    return vectors[torch.arange(count, device=vectors.device) * len(vectors) // count]


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


class FaissSearch:
    """Search by any Faiss index, on the GPU if the vectors and Faiss are on one.

    A query for which the index finds fewer than k rows (an inverted file whose visited lists are short) is
    searched again exactly. Where rows tie for the last place, Faiss chooses among them.

    Args:
        vectors: `(N, d)`, the rows to search.
        index: Faiss factory string with optional `;parameter=value`.
        advance: Function that is called with the number of rows that the index has just taken.
    """

    def __init__(
        self, vectors: Tensor, index: str, *, advance: Callable[[int], object] = lambda rows: None
    ) -> None:
        faiss = import_faiss()
        self.vectors = vectors
        factory, _, parameters = index.partition(";")
        try:
            built = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                'Argument `index` has to be "auto", "exact" or a Faiss factory string such as "Flat", '
                f'"IVF1024,Flat" or "HNSW32", but got {factory!r}.'
            ) from error
        self._set_parameters(built, parameters)
        self._exhaustive = factory == "Flat"
        self._on_gpu = vectors.is_cuda and faiss_has_gpu() and "HNSW" not in factory
        if self._on_gpu:
            import faiss.contrib.torch_utils  # tensors in and out, on torch's stream

            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(_GPU_SCRATCH_BYTES)
            built = faiss.index_cpu_to_gpu(self._resources, vectors.device.index or 0, built)
        try:
            if not built.is_trained:
                built.train(self._as_faiss(_training_rows(built, vectors)))
            for block in vectors.split(_ROWS_PER_ADDITION):
                built.add(self._as_faiss(block))
                advance(len(block))
            built.search(self._as_faiss(vectors[:1]), 1)  # some parameters, such as nprobe=0, only fail here
        except RuntimeError as error:
            raise ValueError(
                f"Argument `index` has to suit {len(vectors)} rows, but got {index!r}, which Faiss "
                f"cannot build or search on them: {str(error).splitlines()[0]}"
            ) from error
        self._index = built

    def save(self, path: Path) -> None:
        """Write the index to a file; the vectors are not in it, unless as the index holds them.

        Args:
            path: Path of the file.

        Raises:
            OSError: The file cannot be written.
        """
        faiss = import_faiss()
        index = faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error

    @classmethod
    def load(cls, path: Path, vectors: Tensor, index: str) -> "FaissSearch":
        """Search by an index in a file, which is mapped into memory.

        Args:
            path: Path of a file that `save` has written.
            vectors: `(N, d)` on the CPU, the rows that the index was built of.
            index: The factory string that it was built by; its parameters are set.

        Raises:
            OSError: The file is missing, damaged or of other rows.
        """
        faiss = import_faiss()
        factory, _, parameters = index.partition(";")
        # Faiss maps inverted lists by one flag and what other kinds hold by another.
        mapped = faiss.IO_FLAG_MMAP if "IVF" in factory else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
        try:
            stored = faiss.read_index(str(path), mapped)
        except RuntimeError as error:
            raise OSError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        if (stored.ntotal, stored.d) != tuple(vectors.shape):
            raise OSError(f"{path} is an index of {stored.ntotal} rows of width {stored.d}.")
        cls._set_parameters(stored, parameters)
        found = cls.__new__(cls)
        found.vectors, found._index = vectors, stored
        found._exhaustive, found._on_gpu = factory == "Flat", False
        return found

    @staticmethod
    def _set_parameters(index: Any, parameters: str) -> None:
        """Set the search parameters of an index, or the number of lists to visit if there are none."""
        faiss = import_faiss()
        inverted_file = faiss.try_extract_index_ivf(index)
        if parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                raise ValueError(
                    "Argument `index` has to name search parameters that its kind of index has, such as "
                    f'"IVF1024,Flat;nprobe=64", but got {parameters!r}.'
                ) from error
        elif inverted_file is not None:
            inverted_file.nprobe = max(1, round(inverted_file.nlist * _DEFAULT_PROBED_SHARE))

    def _as_faiss(self, rows: Tensor) -> Any:
        """Float32 rows in the form that the index takes: a tensor on the GPU, an array on the CPU."""
        rows = rows.detach().float().contiguous()
        return rows if self._on_gpu else rows.cpu().numpy()

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `Search` describes."""
        scores, rows = self._index.search(self._as_faiss(queries), k)
        scores = torch.as_tensor(scores, device=queries.device)  # (B, K)
        rows = torch.as_tensor(rows, device=queries.device)  # (B, K), -1 where nothing was found
        if not self._exhaustive and bool((incomplete := (rows < 0).any(dim=1)).any()):
            exact_scores, exact_rows = ExactSearch(self.vectors)(queries[incomplete], k)
            scores[incomplete], rows[incomplete] = exact_scores.to(scores.dtype), exact_rows
        return sort_candidates(scores, rows)
