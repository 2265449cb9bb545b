"""Triplet loss over a similarity matrix. Axes: `B` batch."""

from typing import Literal

import torch
from torch import Tensor

TripletNegatives = Literal["hardest", "all"]


def triplet_hinges(
    similarity: Tensor,
    margin: float = 0.2,
    *,
    negatives: TripletNegatives = "hardest",
    ignore: Tensor | None = None,
) -> Tensor:
    """Hinges of the rows of a similarity matrix whose diagonal holds the pairs.

    With m the margin and N_i the negatives of row i:

        hardest:  [m + max_{j ∈ N_i} S_ij - S_ii]_+          all:  [m + S_ij - S_ii]_+ for each j ∈ N_i

    One direction of the loss, which is the sum of all hinges of both directions divided by B.

    Args:
        similarity: `(B, B)`, similarity of query i (row) and candidate j (column).
        margin: m ≥ 0, by which a pair shall be more similar than a negative.
        negatives: `"hardest"` or `"all"`.
        ignore: `(B, B)` boolean; true entries are no negatives, such as other captions of the same clip. The
            diagonal never is one.

    Returns:
        `(B, 1)` with the hardest negatives, `(B, B)` with all; 0 where there is no negative.

    References:
        VSE++ (Faghri et al., arXiv 1707.05612, Eq. 5 and 6). Metric learning for audio-text retrieval (Mei et
        al., arXiv 2203.15537) compares both, as triplet-max and triplet-sum.

    Examples:
        >>> triplet_hinges(torch.tensor([[0.9, 0.8], [0.1, 0.7]]))
        tensor([[0.1000],
                [0.0000]])
    """
    positive = similarity.diagonal()[:, None]  # (B, 1)
    left_out = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    if ignore is not None:
        left_out = left_out | ignore
    negative = similarity.masked_fill(left_out, -torch.inf)  # (B, B)
    if negatives == "hardest":
        negative = negative.amax(dim=1, keepdim=True)  # (B, 1)
    return (margin + negative - positive).clamp(min=0)
