"""Coarse knowledge, Eq. 8: pairing of the clusters of both modalities, and max-pooling of their members.

Axes: `n` pairs of this rank, `N` pairs of all ranks, `M` prototypes, `d` width.
"""

from typing import Literal, get_args

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.kmeans import Clustering, kmeans
from ask_lightning.knowledge.pairs import PairStore, StoredPairs
from ask_lightning.knowledge.row_shard import ShardedRows
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.dtypes import computation_dtype

PrototypePairing = Literal["matched", "joint", "audio", "text", "index"]
PAIRINGS: tuple[str, ...] = get_args(PrototypePairing)


def build_prototypes(
    pairs: PairStore,
    num_prototypes: int,
    *,
    pairing: PrototypePairing = "matched",
    normalize: bool = True,
    clustering: Clustering = "spherical",
    seed: int = 0,
) -> StoredPairs:
    """Condense the pairs into paired prototypes.

    Eq. 8 of the paper: K-means, then the element-wise maximum over each cluster's members. The paper
    clusters audio and text separately yet speaks of pairs; `pairing` says how they come to be pairs:

    * `"matched"`: cluster each modality, then match clusters one-to-one by the number of pairs that they
      share (optimal assignment).
    * `"joint"`: cluster the concatenated pairs once.
    * `"audio"`, `"text"`: cluster one modality, pool both by it.
    * `"index"`: cluster each modality and pair number m with number m, which have nothing in common.

    Args:
        pairs: The pairs, unit vectors; this is collective where they are sharded.
        num_prototypes: M in [1, N].
        pairing: How audio and text clusters become pairs, see above.
        normalize: Whether to bring the pooled vectors back to unit length, which keeps similarities in
            [-1, 1].
        clustering: The kind of K-means, `"spherical"` or `"euclidean"`, see `kmeans`.
        seed: Seed of the K-means initialisation.

    Returns:
        M prototypes, the same on every rank.

    Examples:
        >>> build_prototypes(StoredPairs(torch.eye(4), torch.eye(4)), 2).audio.shape
        torch.Size([2, 4])
    """
    shard = pairs.shard
    audio, text = pairs.local.tables(shard)

    def cluster(rows: ShardedRows, seed: int = seed) -> Tensor:
        return kmeans(rows, num_prototypes, seed, clustering)

    if pairing == "joint":
        joint = torch.cat([audio.local, text.local], dim=1) * 0.5**0.5
        by_audio = by_text = cluster(ShardedRows(joint, shard))
    elif pairing in ("audio", "text"):
        by_audio = by_text = cluster(audio if pairing == "audio" else text)
    else:
        # With one seed both would start from the same pairs, and number m of both would be related.
        by_audio, by_text = cluster(audio), cluster(text, seed + 1)
    if pairing == "matched":
        by_text = match_clusters(by_audio, by_text, num_prototypes, shard.ranks)
    pooled_audio, pooled_text = (
        shard.ranks.maximum(max_pool(side, assignment, num_prototypes))
        for side, assignment in ((audio, by_audio), (text, by_text))
    )
    if normalize:
        return StoredPairs(unit_length(pooled_audio), unit_length(pooled_text))
    return StoredPairs(pooled_audio, pooled_text)


def match_clusters(
    by_audio: Tensor, by_text: Tensor, num_clusters: int, ranks: Ranks | None = None
) -> Tensor:
    """Renumber the text clusters so that number m shares the most pairs with audio cluster m overall.

    Args:
        by_audio: `(n,)`, audio cluster of each local pair.
        by_text: `(n,)`, text cluster of each local pair.
        num_clusters: M, the number of clusters of each modality.
        ranks: The processes that hold the pairs; default: this one alone.

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


def max_pool(rows: ShardedRows, assignment: Tensor, num_clusters: int) -> Tensor:
    """Take the element-wise maximum over the members of each cluster.

    Args:
        rows: The vectors, of which the local ones are taken.
        assignment: `(n,)`, cluster of each local vector.
        num_clusters: M, the number of clusters.

    Returns:
        `(M, d)`, minus infinity where a cluster has no member on this rank.

    Examples:
        >>> rows = ShardedRows.unsharded(torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]))
        >>> max_pool(rows, torch.tensor([0, 0, 1]), 2)
        tensor([[1., 2.],
                [5., 5.]])
    """
    dtype = computation_dtype(rows.local)
    pooled = torch.full((num_clusters, rows.local.shape[1]), -torch.inf, dtype=dtype, device=rows.device)
    first = 0
    for block in rows.blocks():
        members = assignment[first : first + len(block), None].expand_as(block)
        pooled.scatter_reduce_(0, members, block, "amax")
        first += len(block)
    return pooled
