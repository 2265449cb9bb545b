"""Search that knows its hubs. Axes: `Q` training queries (the bank), `N` gallery items, `d` width."""

import math
from typing import Literal

import torch
from torch import Tensor

Calibration = Literal["inverted_softmax", "nearest_neighbors"]

# Scores held at a time, as in exact search.
_SCORES_PER_BLOCK = 1 << 22


def hub_bias(
    gallery: Tensor,
    bank: Tensor,
    *,
    calibration: Calibration = "inverted_softmax",
    temperature: float = 0.1,
    num_neighbors: int = 16,
    weight: float = 0.75,
) -> Tensor:
    """How far each gallery item is everybody's neighbour, in units of the score.

    A few items are near to every query: hubs. How near an item is to the queries of the training set, whose
    answers are other items, is subtracted from its scores: `s'(q, r) = s(q, r) - bias(r)`.

    * `"inverted_softmax"`: `bias(r) = τ_b log mean_b exp(s(q_b, r) / τ_b)`, so that `s' / τ_b` is, up to a
      constant, the logarithm of a softmax over queries (Smith et al., arXiv 1702.03859).
    * `"nearest_neighbors"`: `bias(r) = a · mean of the k largest s(q_b, r)` (Chowdhury et al., arXiv
      2410.24114).

    Args:
        gallery: `(N, d)`, the items that are searched, of one modality; unit vectors.
        bank: `(Q, d)`, training queries of the other modality; unit vectors.
        calibration: See above.
        temperature: τ_b > 0, of the inverted softmax.
        num_neighbors: k in [1, Q], of the nearest neighbours.
        weight: a ≥ 0, of the nearest neighbours.

    Returns:
        `(N,)`, in the dtype of the gallery. It depends on the training queries only, so each test query
        stands alone.

    Examples:
        >>> gallery = torch.eye(2)
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # the first item is near to both
        >>> hub_bias(gallery, bank, calibration="nearest_neighbors", num_neighbors=2, weight=1.0)
        tensor([0.9000, 0.3000])
    """
    rows = max(1, _SCORES_PER_BLOCK // max(1, len(bank)))
    biases = []
    for block in gallery.split(rows):
        scores = block @ bank.T  # (block, Q)
        if calibration == "inverted_softmax":
            total = (scores / temperature).logsumexp(dim=1) - math.log(len(bank))
            biases.append(temperature * total)
        else:
            biases.append(weight * scores.topk(min(num_neighbors, len(bank)), dim=1).values.mean(dim=1))
    return torch.cat(biases)
