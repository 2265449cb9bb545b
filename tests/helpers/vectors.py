"""What the tests of the knowledge room share: data, and references in plain numpy."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from ask_lightning.knowledge import KnowledgeBase, Neighborhood
from ask_lightning.knowledge.kmeans import kmeans
from ask_lightning.knowledge.row_shard import ShardedRows
from ask_lightning.utilities import faiss_import

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_numbers(rows: int, width: int, seed: int = 0, largest: int = 2, dtype=torch.float32) -> Tensor:
    """Vectors of small whole numbers: inner products are exact in any order of summation, and often tie."""
    return torch.randint(-largest, largest + 1, (rows, width), generator=generator(seed)).to(dtype)


def directions(rows: int, width: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Random unit vectors."""
    drawn = torch.randn(rows, width, generator=generator(seed), dtype=torch.float64)
    return (drawn / drawn.norm(dim=1, keepdim=True)).to(dtype)


def planted(sizes: list[int], width: int, seed: int = 0, spread: float = 0.05) -> tuple[Tensor, Tensor]:
    """Unit vectors around orthogonal directions, shuffled, and the group of each."""
    order = torch.randperm(sum(sizes), generator=generator(seed))
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[order]
    noise = torch.randn(len(group), width, generator=generator(seed + 1))
    return torch.nn.functional.normalize(torch.eye(width)[group] + spread * noise, dim=1), group


def sorted_search(vectors: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows by sorting all rows by (-score, row), in float64."""
    scores = queries.cpu().double().numpy() @ vectors.cpu().double().numpy().T
    rows = np.array([np.lexsort((np.arange(len(vectors)), -row))[:k] for row in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


def same_partition(one: Tensor, other: Tensor) -> bool:
    """Whether two numberings group the rows in the same way."""
    pairs = {(int(a), int(b)) for a, b in zip(one, other, strict=True)}
    return len(pairs) == len(one.unique()) == len(other.unique())


def cluster(vectors: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """K-means by one process that has all rows."""
    return kmeans(ShardedRows.unsharded(vectors), num_clusters, seed)


def tensors_of(base: KnowledgeBase) -> dict[str, Tensor]:
    """All tensors of a replicated base, by their names in a snapshot."""
    return {
        "fine_audio": base.fine.audio,
        "fine_text": base.fine.text,
        "coarse_audio": base.coarse.audio,
        "coarse_text": base.coarse.text,
        "ids": base.ids,
    }


def tensors_in(hood: Neighborhood) -> tuple[Tensor, ...]:
    """Both tensors of row numbers, then the four of vectors."""
    return tuple(vars(hood).values())


@contextmanager
def faiss_as(module: object) -> Iterator[None]:
    """Stand `module` in for faiss; `None` is a faiss that is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "faiss", module)
        faiss_import.import_faiss.cache_clear()
        try:
            yield
        finally:
            faiss_import.import_faiss.cache_clear()
