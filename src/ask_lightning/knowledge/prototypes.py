"""Coarse knowledge, Eq. 8: K-means, pairing of the clusters, max-pooling.

Axes: `N` pairs, `M` prototypes, `d` width.
"""

from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.faiss_import import faiss_has_gpu, import_faiss
from ask_lightning.knowledge.search import ExactSearch

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
        audio: `(N, d)` unit vectors.
        text: `(N, d)` unit vectors, row j of both is pair j.
        num_prototypes: M in [1, N].
        pairing: See above.
        normalize: Bring the pooled vectors back to unit length, which keeps similarities in [-1, 1].
        seed: Of K-means.

    Returns:
        Audio and text prototypes, `(M, d)` each.
    """
    if pairing == "joint":
        by_audio = by_text = cluster(torch.cat([audio, text], dim=1) * 0.5**0.5, num_prototypes, seed)
    elif pairing in ("audio", "text"):
        by_audio = by_text = cluster(audio if pairing == "audio" else text, num_prototypes, seed)
    else:
        # With one seed both would start from the same pairs, and number m of both would be related.
        by_audio, by_text = (cluster(side, num_prototypes, seed + n) for n, side in enumerate((audio, text)))
    if pairing == "matched":
        by_text = match_clusters(by_audio, by_text, num_prototypes)
    prototypes = (max_pool(audio, by_audio, num_prototypes), max_pool(text, by_text, num_prototypes))
    return (unit_length(prototypes[0]), unit_length(prototypes[1])) if normalize else prototypes


def cluster(vectors: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Spherical K-means by Faiss over every row, without empty clusters.

    Where Faiss cannot be loaded the same algorithm runs in torch.

    Args:
        vectors: `(N, d)` unit vectors.
        num_clusters: M in [1, N].
        seed: Of the initial centroids.

    Returns:
        `(N,)` int64, the cluster of each row; each of the M numbers occurs.
    """
    if num_clusters == len(vectors):
        return torch.arange(num_clusters, device=vectors.device)
    try:
        faiss = import_faiss()
    except ImportError:
        centroids = _centroids_by_torch(vectors, num_clusters, seed)
    else:
        centroids = _centroids_by_faiss(faiss, vectors, num_clusters, seed)
    similarity, assignment = ExactSearch(centroids)(vectors, 1)
    return _fill_empty_clusters(assignment[:, 0], similarity[:, 0], num_clusters)


def match_clusters(by_audio: Tensor, by_text: Tensor, num_clusters: int) -> Tensor:
    """Renumber the text clusters so that number m shares the most pairs with audio cluster m overall.

    Args:
        by_audio: `(N,)`, audio cluster of each pair.
        by_text: `(N,)`, text cluster of each pair.
        num_clusters: M.

    Returns:
        `(N,)`, the renumbered `by_text`.

    Example:
        >>> match_clusters(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), 2)
        tensor([0, 0, 1])
    """
    shared = torch.bincount(by_text * num_clusters + by_audio, minlength=num_clusters**2)
    counts = shared.view(num_clusters, num_clusters).cpu().numpy()  # text clusters × audio clusters
    _, partner = linear_sum_assignment(counts, maximize=True)
    return torch.as_tensor(partner, device=by_text.device)[by_text]


def max_pool(vectors: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Element-wise maximum over the members of each cluster.

    Args:
        vectors: `(N, d)`.
        assignment: `(N,)`, cluster of each row; no cluster empty.
        num_clusters: M.

    Returns:
        `(M, d)`.

    Example:
        >>> max_pool(torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[1., 2.],
                [5., 5.]])
    """
    pooled = vectors.new_full((num_clusters, vectors.shape[1]), -torch.inf)
    return pooled.scatter_reduce_(0, assignment[:, None].expand_as(vectors), vectors, "amax")


def _centroids_by_faiss(faiss, vectors: Tensor, num_clusters: int, seed: int) -> Tensor:  # type: ignore[no-untyped-def]
    width = vectors.shape[1]
    settings = faiss.ClusteringParameters()
    # Its seed is a C int; Lightning's seeds go up to 2^32 - 1.
    settings.niter, settings.seed, settings.spherical = _ITERATIONS, seed % 2**31, True
    # Faiss leaves out rows above 256 per centroid without a word, and prints to stderr below 39.
    settings.max_points_per_centroid, settings.min_points_per_centroid = len(vectors), 1
    training = faiss.Clustering(width, num_clusters, settings)
    if vectors.is_cuda and faiss_has_gpu():
        resources, options = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
        options.device = vectors.device.index or 0
        index = faiss.GpuIndexFlatIP(resources, width, options)
    else:
        index = faiss.IndexFlatIP(width)
    training.train(np.ascontiguousarray(vectors.float().cpu().numpy()), index)
    centroids = faiss.vector_to_array(training.centroids).reshape(num_clusters, width)
    return torch.from_numpy(centroids.copy()).to(vectors)


def _centroids_by_torch(vectors: Tensor, num_clusters: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(vectors), generator=generator)[:num_clusters]
    centroids = vectors[start.to(vectors.device)]
    for _ in range(_ITERATIONS):
        similarity, assignment = ExactSearch(centroids)(vectors, 1)
        assignment = _fill_empty_clusters(assignment[:, 0], similarity[:, 0], num_clusters)
        centroids = unit_length(torch.zeros_like(centroids).index_add_(0, assignment, vectors))
    return centroids


def _fill_empty_clusters(assignment: Tensor, similarity: Tensor, num_clusters: int) -> Tensor:
    """Give each empty cluster the row that fits its own cluster worst, of clusters with rows to spare."""
    sizes = torch.bincount(assignment, minlength=num_clusters).tolist()
    empty = [number for number, size in enumerate(sizes) if size == 0]
    if not empty:
        return assignment
    assignment = assignment.clone()
    misfits = iter(similarity.argsort(stable=True).tolist())
    for number in empty:
        row = next(row for row in misfits if sizes[int(assignment[row])] > 1)
        sizes[int(assignment[row])] -= 1
        sizes[number] = 1
        assignment[row] = number
    return assignment
