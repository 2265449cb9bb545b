"""Coarse knowledge, Eq. 8: K-means, pairing of the clusters, max-pooling.

The rows may be spread over ranks: each works on its own, and only sums, counts and maxima travel.

Axes: `n` rows of this rank, `N` rows of all, `M` prototypes, `d` width.
"""

from typing import Literal, get_args

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.row_shard import Part
from ask_lightning.knowledge.search import build_search
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.faiss_import import faiss_is_available

PrototypePairing = Literal["matched", "joint", "audio", "text", "index"]
PAIRINGS: tuple[str, ...] = get_args(PrototypePairing)

_ITERATIONS = 20


def build_prototypes(
    audio: Tensor,
    text: Tensor,
    num_prototypes: int,
    *,
    pairing: PrototypePairing = "matched",
    normalize: bool = True,
    seed: int = 0,
    part: Part | None = None,
) -> tuple[Tensor, Tensor]:
    """Condense the pairs into paired prototypes.

    Eq. 8 of the paper: K-means, then the element-wise maximum over each cluster's members. The paper
    clusters audio and text separately yet speaks of pairs; `pairing` says how they come to be pairs:

    * `"matched"`: cluster each modality, then match clusters one-to-one by the number of pairs that they
      share (optimal assignment).
    * `"joint"`: cluster the concatenated pairs once.
    * `"audio"`, `"text"`: cluster one modality, pool both by it.
    * `"index"`: cluster each modality and pair number m with number m, which have nothing in common.

    Args:
        audio: `(n, d)` unit vectors.
        text: `(n, d)` unit vectors, row j of both is pair j.
        num_prototypes: M in [1, N].
        pairing: See above.
        normalize: Bring the pooled vectors back to unit length, which keeps similarities in [-1, 1].
        seed: Of K-means.
        part: Which rows of the source these are; default all of them.

    Returns:
        Audio and text prototypes, `(M, d)` each, the same on every rank.
    """
    part = part or Part.dealt(len(audio), Ranks())
    if pairing == "joint":
        both = torch.cat([audio, text], dim=1) * 0.5**0.5
        by_audio = by_text = cluster(both, num_prototypes, seed, part)
    elif pairing in ("audio", "text"):
        by_audio = by_text = cluster(audio if pairing == "audio" else text, num_prototypes, seed, part)
    else:
        # With one seed both would start from the same pairs, and number m of both would be related.
        by_audio, by_text = (
            cluster(side, num_prototypes, seed + n, part) for n, side in enumerate((audio, text))
        )
    if pairing == "matched":
        by_text = match_clusters(by_audio, by_text, num_prototypes, part.ranks)
    pooled_audio, pooled_text = (
        part.ranks.maximum(max_pool(side, assignment, num_prototypes))
        for side, assignment in ((audio, by_audio), (text, by_text))
    )
    return (unit_length(pooled_audio), unit_length(pooled_text)) if normalize else (pooled_audio, pooled_text)


def cluster(vectors: Tensor, num_clusters: int, seed: int = 0, part: Part | None = None) -> Tensor:
    """Spherical K-means over every row of the source, without empty clusters.

    Lloyd's iteration from randomly chosen rows; a row joins the nearest centroid by Faiss's search where
    there is Faiss. How the rows are spread over ranks changes the sums' rounding only. (Faiss's own K-means
    does without the ranks, and leaves rows out above 256 for a centroid.)

    Args:
        vectors: `(n, d)` unit vectors, this rank's.
        num_clusters: M in [1, N].
        seed: Of the initial centroids.
        part: Which rows of the source these are; default all of them.

    Returns:
        `(n,)` int64, the cluster of each row; each of the M numbers occurs on some rank.
    """
    part = part or Part.dealt(len(vectors), Ranks())
    if num_clusters == part.total:
        return part.rows().to(vectors.device)
    return _nearest(vectors, _centroids(vectors, num_clusters, seed, part), part, _search_by(vectors))


def match_clusters(
    by_audio: Tensor, by_text: Tensor, num_clusters: int, ranks: Ranks | None = None
) -> Tensor:
    """Renumber the text clusters so that number m shares the most pairs with audio cluster m overall.

    Args:
        by_audio: `(n,)`, audio cluster of each pair.
        by_text: `(n,)`, text cluster of each pair.
        num_clusters: M.
        ranks: The processes over which the pairs are spread; default this one.

    Returns:
        `(n,)`, the renumbered `by_text`.

    Examples:
        >>> match_clusters(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), 2)
        tensor([0, 0, 1])
    """
    shared = torch.bincount(by_text * num_clusters + by_audio, minlength=num_clusters**2)
    shared = (ranks or Ranks()).sum(shared)
    counts = shared.view(num_clusters, num_clusters).cpu().numpy()  # text clusters × audio clusters
    _, partner = linear_sum_assignment(counts, maximize=True)
    return torch.as_tensor(partner, device=by_text.device)[by_text]


def max_pool(vectors: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Element-wise maximum over the members of each cluster.

    Args:
        vectors: `(n, d)`.
        assignment: `(n,)`, cluster of each row.
        num_clusters: M.

    Returns:
        `(M, d)`, minus infinity where a cluster has no row.

    Examples:
        >>> max_pool(torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[1., 2.],
                [5., 5.]])
    """
    pooled = vectors.new_full((num_clusters, vectors.shape[1]), -torch.inf)
    return pooled.scatter_reduce_(0, assignment[:, None].expand_as(vectors), vectors, "amax")


def _centroids(vectors: Tensor, num_clusters: int, seed: int, part: Part) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(part.total, generator=generator)[:num_clusters].to(vectors.device)
    (centroids,), index = part.fetch(start, vectors), _search_by(vectors)  # (M, d)
    for _ in range(_ITERATIONS):
        assignment = _nearest(vectors, centroids, part, index)  # (n,)
        sums = torch.zeros_like(centroids).index_add_(0, assignment, vectors)  # (M, d)
        centroids = unit_length(part.ranks.sum(sums))
    return centroids


def _search_by(vectors: Tensor) -> str:
    # Asked once: an index on a GPU would be built for every iteration, an absent Faiss looked for.
    return "exact" if vectors.is_cuda or not faiss_is_available() else "auto"


def _nearest(vectors: Tensor, centroids: Tensor, part: Part, index: str) -> Tensor:
    """The centroid that each row is most similar to, `(n,)`, but a row for every centroid."""
    similarity, assignment = (found[:, 0] for found in build_search(centroids, index)(vectors, 1))
    sizes = part.ranks.sum(torch.bincount(assignment, minlength=len(centroids)))
    if bool((sizes > 0).all()):
        return assignment
    # Which rows are to move is decided by all ranks from the same numbers.
    everyone = _fill_empty_clusters(part.whole(assignment), part.whole(similarity), sizes.tolist())
    return part.own(everyone)


def _fill_empty_clusters(assignment: Tensor, similarity: Tensor, sizes: list[int]) -> Tensor:
    """Give each empty cluster the row that fits its own cluster worst, of clusters with rows to spare."""
    assignment = assignment.clone()
    misfits = iter(similarity.argsort(stable=True).tolist())
    for number in [number for number, size in enumerate(sizes) if size == 0]:
        row = next(row for row in misfits if sizes[int(assignment[row])] > 1)
        sizes[int(assignment[row])] -= 1
        sizes[number] = 1
        assignment[row] = number
    return assignment
