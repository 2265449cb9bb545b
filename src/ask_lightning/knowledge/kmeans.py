"""Spherical K-means over rows that may be sharded: only sums, counts and moved rows travel between ranks.

Axes: `n` rows of this rank, `N` rows of all ranks, `M` clusters, `d` width.
"""

import torch
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.row_shard import ShardedRows
from ask_lightning.knowledge.search import build_search
from ask_lightning.utilities.faiss_import import faiss_is_available

_ITERATIONS = 20


def kmeans(rows: ShardedRows, num_clusters: int, seed: int = 0) -> Tensor:
    """Cluster unit vectors by their cosine, with no cluster left empty.

    Lloyd's iteration from randomly chosen rows; Faiss, if it is installed, finds the nearest centroids. How
    the rows are sharded changes only the rounding of sums. (Faiss's own K-means does not work over ranks,
    and ignores rows beyond 256 for each centroid.)

    Args:
        rows: The unit vectors.
        num_clusters: M in [1, N].
        seed: Seed of the choice of initial centroids.

    Returns:
        `(n,)` int64, the cluster of each local row; each of the M numbers occurs on some rank.

    Examples:
        >>> kmeans(ShardedRows.unsharded(torch.eye(3)), 3)
        tensor([0, 1, 2])
    """
    if num_clusters == rows.shard.num_rows:
        return rows.shard.global_rows().to(rows.local.device)
    index = _index_of_centroids(rows.local)
    return assign_clusters(rows, fit_centroids(rows, num_clusters, seed, index), index)


def fit_centroids(rows: ShardedRows, num_clusters: int, seed: int, index: str) -> Tensor:
    """Move randomly chosen rows by Lloyd's iteration.

    Args:
        rows: The unit vectors.
        num_clusters: M in [1, N].
        seed: Seed of the choice of initial centroids.
        index: How to search the centroids, see `build_search`.

    Returns:
        `(M, d)`, the centroids, the same on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(rows.shard.num_rows, generator=generator)[:num_clusters]
    centroids = rows.fetch(chosen.to(rows.local.device))  # (M, d)
    for _ in range(_ITERATIONS):
        assignment = assign_clusters(rows, centroids, index)  # (n,)
        sums = torch.zeros_like(centroids).index_add_(0, assignment, rows.local)  # (M, d)
        centroids = unit_length(rows.shard.ranks.sum(sums))
    return centroids


def assign_clusters(rows: ShardedRows, centroids: Tensor, index: str) -> Tensor:
    """Assign each row to its most similar centroid, but at least one row to every centroid.

    Args:
        rows: The unit vectors.
        centroids: `(M, d)`, the same on every rank.
        index: How to search the centroids, see `build_search`.

    Returns:
        `(n,)` int64, the number of each local row's centroid.
    """
    similarity, assignment = (found[:, 0] for found in build_search(centroids, index)(rows.local, 1))
    sizes = rows.shard.ranks.sum(torch.bincount(assignment, minlength=len(centroids)))
    if bool((sizes > 0).all()):
        return assignment
    # All ranks decide which rows are to move, each from the same numbers.
    whole_assignment, whole_similarity = rows.shard.gather(assignment), rows.shard.gather(similarity)
    return rows.shard.select(_fill_empty_clusters(whole_assignment, whole_similarity, sizes.tolist()))


def _index_of_centroids(vectors: Tensor) -> str:
    # Decided once: an index on a GPU would be built, and a missing Faiss looked for, in every iteration.
    return "exact" if vectors.is_cuda or not faiss_is_available() else "auto"


def _fill_empty_clusters(assignment: Tensor, similarity: Tensor, sizes: list[int]) -> Tensor:
    """Give each empty cluster the row that fits its own cluster worst, from clusters of more than one row."""
    assignment = assignment.clone()
    worst_fitting = iter(similarity.argsort(stable=True).tolist())
    for number in [number for number, size in enumerate(sizes) if size == 0]:
        row = next(row for row in worst_fitting if sizes[int(assignment[row])] > 1)
        sizes[int(assignment[row])] -= 1
        sizes[number] = 1
        assignment[row] = number
    return assignment
