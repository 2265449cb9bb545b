"""K-means over rows that may be sharded: only sums, counts and moved rows travel between ranks.

Axes: `n` rows of this rank, `N` rows of all ranks, `M` clusters, `d` width.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.row_shard import ShardedRows
from ask_lightning.knowledge.search import build_search
from ask_lightning.utilities.faiss_import import faiss_is_available

Clustering = Literal["spherical", "euclidean"]
CLUSTERINGS: tuple[str, ...] = get_args(Clustering)

# Up to so many rows, each iteration looks at all of them. Of more, centroids are found on samples that grow,
# each of so many rows for a centroid and for so many iterations, before one last iteration over all rows
# (benchmarks/prototypes.py measures what that costs: less than half a percent of the objective).
_ROWS_FITTED_WHOLE = 1 << 17
_SAMPLES = ((32, 1 << 14, 12), (128, 1 << 16, 6))
# Euclidean K-means has as many iterations as Faiss's by default.
_ITERATIONS: dict[Clustering, int] = {"spherical": 20, "euclidean": 25}


def kmeans(
    rows: ShardedRows, num_clusters: int, seed: int = 0, clustering: Clustering = "spherical"
) -> Tensor:
    """Cluster unit vectors, with no cluster left empty.

    Lloyd's iteration from randomly chosen rows; Faiss, if it is installed, finds the nearest centroids. How
    the rows are sharded changes only the rounding of sums. Of more than 131,072 rows most iterations look at
    a sample; the last one, and the assignment that is returned, at all of them.

    * `"spherical"`: centroids are unit vectors, and a row belongs to the one of largest cosine.
    * `"euclidean"`: centroids are means, and a row belongs to the nearest one: what `faiss.Kmeans` does by
      default, from the same initial centroids with the same result. Unlike Faiss it works over ranks, uses
      the rows beyond 256 for each centroid as well, and gives an empty cluster the row that fits its own
      worst instead of half of another cluster.

    Args:
        rows: The unit vectors.
        num_clusters: M in [1, N].
        seed: Seed of the choice of initial centroids.
        clustering: The kind of K-means, see above.

    Returns:
        `(n,)` int64, the cluster of each local row; each of the M numbers occurs on some rank.

    Examples:
        >>> kmeans(ShardedRows.unsharded(torch.eye(3)), 3)
        tensor([0, 1, 2])
    """
    if num_clusters == rows.shard.num_rows:
        return rows.shard.global_rows().to(rows.device)
    index = _index_of_centroids(rows.device)
    centroids = fit_centroids(rows, num_clusters, seed, index, clustering)
    return assign_clusters(rows, centroids, index, clustering)


def fit_centroids(
    rows: ShardedRows, num_clusters: int, seed: int, index: str, clustering: Clustering = "spherical"
) -> Tensor:
    """Move randomly chosen rows by Lloyd's iteration.

    Args:
        rows: The unit vectors.
        num_clusters: M in [1, N].
        seed: Seed of the choice of initial centroids.
        index: How to search the centroids, see `build_search`.
        clustering: The kind of K-means, see `kmeans`.

    Returns:
        `(M, d)`, the centroids, the same on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows.shard.num_rows, generator=generator)
    centroids = rows.fetch(order[:num_clusters].to(rows.device))  # (M, d)
    if rows.file is not None:
        centroids = centroids.float()
    plan = [(rows, _ITERATIONS[clustering])]
    if rows.shard.num_rows > _ROWS_FITTED_WHOLE:
        sizes = [(max(share * num_clusters, fewest), count) for share, fewest, count in _SAMPLES]
        plan = [(rows.select(order[:size]), count) for size, count in sizes if size < rows.shard.num_rows]
        plan.append((rows, 1))
    for part, iterations in plan:
        for _ in range(iterations):
            centroids = move_centroids(part, centroids, index, clustering)
    return centroids


def move_centroids(rows: ShardedRows, centroids: Tensor, index: str, clustering: Clustering) -> Tensor:
    """One of Lloyd's iterations: assign the rows, and move each centroid to the middle of its own.

    Args:
        rows: The unit vectors.
        centroids: `(M, d)`, the same on every rank.
        index: How to search the centroids, see `build_search`.
        clustering: The kind of K-means, see `kmeans`.

    Returns:
        `(M, d)`, the new centroids.
    """
    assignment = assign_clusters(rows, centroids, index, clustering)  # (n,)
    sums, first = torch.zeros_like(centroids), 0
    for block in rows.blocks():
        sums.index_add_(0, assignment[first : first + len(block)], block)  # (M, d)
        first += len(block)
    sums = rows.shard.ranks.sum(sums)
    if clustering == "spherical":
        return unit_length(sums)
    sizes = rows.shard.ranks.sum(torch.bincount(assignment, minlength=len(centroids)))
    return sums / sizes[:, None]


def assign_clusters(
    rows: ShardedRows, centroids: Tensor, index: str, clustering: Clustering = "spherical"
) -> Tensor:
    """Assign each row to its most similar or nearest centroid, but at least one row to every centroid.

    Args:
        rows: The unit vectors.
        centroids: `(M, d)`, the same on every rank.
        index: How to search the centroids, see `build_search`.
        clustering: The kind of K-means, see `kmeans`.

    Returns:
        `(n,)` int64, the number of each local row's centroid.
    """
    if clustering == "euclidean":
        # The nearest c has the largest x · c - ½‖c‖², which is the inner product of (x, 1) and (c, -½‖c‖²).
        offsets = -0.5 * centroids.square().sum(dim=1, keepdim=True)  # (M, 1)
        centroids = torch.cat([centroids, offsets], dim=1)  # (M, d + 1)
    search, found = build_search(centroids, index), []
    for block in rows.blocks():
        queries = block
        if clustering == "euclidean":
            queries = torch.cat([block, torch.ones_like(block[:, :1])], dim=1)  # (n, d + 1)
        found.append([side[:, 0] for side in search(queries, 1)])
    similarity, assignment = (torch.cat(side) for side in zip(*found, strict=True))
    sizes = rows.shard.ranks.sum(torch.bincount(assignment, minlength=len(centroids)))
    if bool((sizes > 0).all()):
        return assignment
    # All ranks decide which rows are to move, each from the same numbers.
    whole_assignment, whole_similarity = rows.shard.gather(assignment), rows.shard.gather(similarity)
    return rows.shard.select(_fill_empty_clusters(whole_assignment, whole_similarity, sizes.tolist()))


def _index_of_centroids(device: torch.device) -> str:
    # Decided once: an index on a GPU would be built, and a missing Faiss looked for, in every iteration.
    return "exact" if device.type != "cpu" or not faiss_is_available() else "auto"


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
