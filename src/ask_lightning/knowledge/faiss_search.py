"""Search by the indexes of Faiss. Axes: `B` queries, `N` rows, `K` neighbours, `d` width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ask_lightning.knowledge.exact_search import ExactSearch, sort_candidates
from ask_lightning.utilities.evenly_spaced import evenly_spaced
from ask_lightning.utilities.faiss_import import faiss_has_gpu, import_faiss

# Share of an inverted file's lists that is visited unless the index string sets `nprobe`.
_DEFAULT_PROBED_SHARE = 1 / 16
_GPU_SCRATCH_BYTES = 256 << 20
# Rows that an index takes at a time, of which a float32 copy is held.
_ROWS_PER_ADDITION = 1 << 16
# Rows from which an index learns its lists or ranges, and rows for each list if that is more.
_TRAINING_ROWS = 1 << 18
_TRAINING_ROWS_PER_LIST = 64
# What an index has learnt is used again as long as the mean squared distance between rows and what the index
# takes them for, over so many of them, has not grown by more than this since then.
_TOLERATED_GROWTH = 1.2
_ROWS_OF_THE_ERROR = 4096


@dataclass(frozen=True)
class TrainedIndex:
    """What a Faiss index learns from rows (the centroids of its lists, its codebooks), without the rows.

    Attributes:
        factory: The factory string.
        width: d.
        content: The empty index, serialised.
        errors: The `quantization_errors` of the rows that it was learnt from.
    """

    factory: str
    width: int
    content: Any
    errors: tuple[float, ...]

    @classmethod
    def of_tensor(cls, content: Tensor, description: Mapping[str, Any]) -> TrainedIndex:
        """What `content_tensor` and `description` were made of."""
        errors = tuple(float(error) for error in description["errors"])
        return cls(str(description["factory"]), int(description["width"]), content.numpy(), errors)

    @property
    def content_tensor(self) -> Tensor:
        """The empty index, serialised, as `(n,)` uint8."""
        return torch.from_numpy(self.content)

    @property
    def description(self) -> dict[str, Any]:
        """The rest, as JSON can hold it."""
        return {"factory": self.factory, "width": self.width, "errors": list(self.errors)}

    def suits(self, factory: str, rows: Tensor) -> bool:
        """Whether an index of a kind can be made of it for some rows.

        Args:
            factory: The factory string of the index.
            rows: `(n, d)` float32, a sample of the rows, on a CPU.
        """
        if (self.factory, self.width) != (factory, rows.shape[1]):
            return False
        errors = quantization_errors(self.empty_index(), rows)
        return errors is not None and all(
            now <= _TOLERATED_GROWTH * before for now, before in zip(errors, self.errors, strict=True)
        )

    def empty_index(self) -> Any:
        """A new index that has learnt this, without rows."""
        faiss = import_faiss()
        index = faiss.deserialize_index(self.content)
        inverted_file = faiss.try_extract_index_ivf(index)
        if inverted_file is not None:
            inner = faiss.downcast_index(inverted_file)
            if isinstance(inner, faiss.IndexIVFPQFastScan):
                inner.fine_quantizer = inner.pq  # which Faiss forgets to set and decodes with
        return index


def train(index: Any, factory: str, rows: Tensor) -> TrainedIndex | None:
    """Have an empty index learn from rows.

    Args:
        index: The index; afterwards it is ready for rows.
        factory: The factory string that made it.
        rows: `(n, d)` float32 on a CPU.

    Returns:
        What it has learnt; `None` where there is nothing to learn, or nothing that can be judged later.

    Raises:
        RuntimeError: The rows are too few.
    """
    if index.is_trained:
        return None
    index.train(rows.numpy())
    errors = quantization_errors(index, rows)
    if errors is None:
        return None
    return TrainedIndex(factory, rows.shape[1], import_faiss().serialize_index(index), errors)


def quantization_errors(index: Any, rows: Tensor) -> tuple[float, ...] | None:
    """How far rows are from what an index takes them for.

    Args:
        index: A trained index.
        rows: `(n, d)` float32 on a CPU, of which evenly spaced ones are taken.

    Returns:
        The mean squared distances from the centroids of the lists, if there are lists, and from the rows as
        they come out of their codes; `None` for a kind (HNSW among them) whose codes Faiss does not decode.
    """
    faiss = import_faiss()
    places = evenly_spaced(len(rows), _ROWS_OF_THE_ERROR)
    sample = rows[places].numpy()
    errors = []
    inverted_file = faiss.try_extract_index_ivf(index)
    if inverted_file is not None:
        inner = sample
        outer = faiss.downcast_index(index)
        if isinstance(outer, faiss.IndexPreTransform):
            for place in range(outer.chain.size()):
                inner = outer.chain.at(place).apply(inner)
        _, lists = inverted_file.quantizer.search(inner, 1)
        centroids = inverted_file.quantizer.reconstruct_batch(lists[:, 0])
        errors.append(float(((inner - centroids) ** 2).sum(axis=1).mean()))
    try:
        decoded = index.sa_decode(index.sa_encode(sample))
    except RuntimeError:
        return None
    errors.append(float(((sample - decoded) ** 2).sum(axis=1).mean()))
    return tuple(errors)


def empty_index(index: str, width: int) -> tuple[Any, str, str]:
    """Make an index from its description.

    Args:
        index: Faiss factory string with optional `;parameter=value`.
        width: d.

    Returns:
        The index, without rows and untrained, the factory string, and the parameters.

    Raises:
        ValueError: Faiss does not understand the description.
    """
    faiss = import_faiss()
    factory, _, parameters = index.partition(";")
    try:
        built = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            'Argument `index` has to be "auto", "exact" or a Faiss factory string such as "Flat", '
            f'"IVF1024,Flat" or "HNSW32", but got {factory!r}. Of rows of width {width}, compared by inner '
            f"products, Faiss says: {_reason(error)}."
        ) from error
    set_parameters(built, parameters)
    return built, factory, parameters


def _reason(error: RuntimeError) -> str:
    """What Faiss says, without the place in its code."""
    return str(error).splitlines()[0].rpartition(".cpp:")[2].partition(": ")[2].removesuffix(".")


def set_parameters(index: Any, parameters: str) -> None:
    """Set the search parameters of an index, or the number of lists to visit if there are none.

    Args:
        index: The index.
        parameters: Assignments such as `"nprobe=64"`, separated by commas; may be empty.

    Raises:
        ValueError: The index has no such parameter.
    """
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


def fill_index(
    index: str,
    width: int,
    sample: Tensor,
    blocks: Iterable[Tensor],
    num_rows: int,
    trained: TrainedIndex | None,
) -> tuple[Any, TrainedIndex | None]:
    """Make an index of rows on the CPU, from what an earlier one has learnt if that suits them.

    Args:
        index: Faiss factory string with optional `;parameter=value`.
        width: d.
        sample: `(n, d)` float32 on the CPU, the rows to learn from.
        blocks: The rows in order, `(…, d)` float32 on the CPU each.
        num_rows: N, for messages.
        trained: What an earlier index has learnt.

    Returns:
        The index, and what it has learnt, the same object as `trained` if it was used again.

    Raises:
        ValueError: Faiss cannot make or search such an index.
    """
    built, factory, parameters = empty_index(index, width)
    try:
        if trained is not None and trained.suits(factory, sample):
            built = trained.empty_index()
            set_parameters(built, parameters)
        else:
            trained = train(built, factory, sample)
        for block in blocks:
            built.add(block.numpy())
        built.search(sample[:1].numpy(), 1)  # some parameters, such as nprobe=0, only fail here
    except RuntimeError as error:
        raise ValueError(
            f"Argument `index` has to suit {num_rows} rows, but got {index!r}, which Faiss "
            f"cannot build or search on them: {str(error).splitlines()[0]}"
        ) from error
    return built, trained


def training_rows(index: Any, vectors: Tensor) -> Tensor:
    """Evenly spaced rows from which an index learns, all unless there are many.

    Args:
        index: The index.
        vectors: `(N, d)`, the rows.
    """
    inverted_file = import_faiss().try_extract_index_ivf(index)
    lists = 0 if inverted_file is None else inverted_file.nlist
    count = max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * lists)
    if len(vectors) <= count:
        return vectors
    return vectors[torch.arange(count, device=vectors.device) * len(vectors) // count]


class FaissSearch:
    """Search by any Faiss index, on the GPU if the vectors and Faiss are on one.

    A query for which the index finds fewer than k rows (an inverted file whose visited lists are short) is
    searched again exactly. Where rows tie for the last place, Faiss chooses among them.

    Args:
        vectors: `(N, d)`, the rows to search.
        index: Faiss factory string with optional `;parameter=value`.
        trained: What an earlier index has learnt; it is used again where it describes these rows well.
        advance: Function that is called with the number of rows that the index has just taken.

    Attributes:
        kind: The description of the index.
        trained: What this index has learnt, for the one after it; `None` where there is nothing to learn.
    """

    def __init__(
        self,
        vectors: Tensor,
        index: str,
        trained: TrainedIndex | None = None,
        *,
        advance: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self.vectors = vectors
        self.kind = index
        factory = index.partition(";")[0]
        self._exhaustive = factory == "Flat"
        self._on_gpu = vectors.is_cuda and faiss_has_gpu() and "HNSW" not in factory
        self.trained: TrainedIndex | None = None
        if self._on_gpu:
            self._index = self._built_on_gpu(index, advance)
            return
        width = vectors.shape[1]
        sample = _float_rows(training_rows(empty_index(index, width)[0], vectors)).cpu()
        blocks = (block.cpu() for block in self._blocks(advance))
        self._index, self.trained = fill_index(index, width, sample, blocks, len(vectors), trained)

    def _blocks(self, advance: Callable[[int], object]) -> Iterator[Tensor]:
        """Float32 rows, so many at a time, each told when the next is asked for."""
        for block in self.vectors.split(_ROWS_PER_ADDITION):
            yield _float_rows(block)
            advance(len(block))

    def _built_on_gpu(self, index: str, advance: Callable[[int], object]) -> Any:
        """The index on the GPU, which learns fast."""
        faiss = import_faiss()
        import faiss.contrib.torch_utils  # noqa: F811  # tensors in and out, on torch's stream

        built, _, _ = empty_index(index, self.vectors.shape[1])
        sample = _float_rows(training_rows(built, self.vectors))
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_GPU_SCRATCH_BYTES)
        built = faiss.index_cpu_to_gpu(self._resources, self.vectors.device.index or 0, built)
        try:
            if not built.is_trained:
                built.train(sample)
            for block in self._blocks(advance):
                built.add(block)
            built.search(sample[:1], 1)  # some parameters, such as nprobe=0, only fail here
        except RuntimeError as error:
            raise ValueError(
                f"Argument `index` has to suit {len(self.vectors)} rows, but got {index!r}, which Faiss "
                f"cannot build or search on them: {str(error).splitlines()[0]}"
            ) from error
        return built

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
    def load(cls, path: Path, vectors: Tensor, index: str) -> FaissSearch:
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
        set_parameters(stored, parameters)
        found = cls.__new__(cls)
        found.vectors, found.kind, found.trained, found._index = vectors, index, None, stored
        found._exhaustive, found._on_gpu = factory == "Flat", False
        return found

    def _as_faiss(self, rows: Tensor) -> Any:
        """Float32 rows in the form that the index takes: a tensor on the GPU, an array on the CPU."""
        rows = _float_rows(rows)
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


def _float_rows(rows: Tensor) -> Tensor:
    return rows.detach().float().contiguous()
