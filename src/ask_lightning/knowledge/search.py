"""Which search suits a set of rows. Axes: `N` rows, `d` width."""

from __future__ import annotations

import torch
from torch import Tensor

from ask_lightning.knowledge.exact_search import HALF, ExactSearch, FastestExactSearch, Search
from ask_lightning.knowledge.faiss_search import FaissSearch, TrainedIndex
from ask_lightning.utilities.faiss_import import faiss_has_gpu, faiss_is_available


def build_search(vectors: Tensor, index: str, trained: TrainedIndex | None = None) -> Search:
    """Build a search over vectors.

    Args:
        vectors: `(N, d)`, on the device on which queries will be.
        index: `"exact"`; or a Faiss factory string, optionally with search parameters behind a semicolon
            (`"IVF1024,Flat;nprobe=64"`, `"HNSW32;efSearch=128"`); or `"auto"`: Faiss on the GPU if both
            the vectors and Faiss are on one, exact in torch for vectors in half precision, and else exact by
            torch or Faiss, whichever is faster: what is in memory is never searched approximately unless
            asked for. Any Faiss index that is not compressed (as `"SQfp16"` is)
            holds a float32 copy of the vectors.
        trained: What an earlier Faiss index has learnt, see `FaissSearch`.

    Returns:
        The search.

    Raises:
        ImportError: `index` asks for Faiss, which cannot be loaded.
        ValueError: Faiss does not understand `index`.
    """
    if index == "auto" and vectors.is_cuda and faiss_has_gpu() and vectors.dtype not in HALF:
        index = "Flat"
    if index == "auto":
        # Faiss's kernel takes float32 on a CPU only.
        suitable = faiss_is_available() and vectors.is_cpu and vectors.dtype == torch.float32
        return FastestExactSearch(vectors) if suitable else ExactSearch(vectors)
    return ExactSearch(vectors) if index == "exact" else FaissSearch(vectors, index, trained)
