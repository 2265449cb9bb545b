"""Pairwise sigmoid loss over a similarity matrix. Axes: `B` batch."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def sigmoid_losses(
    similarity: Tensor,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    *,
    positives: Tensor | None = None,
    ignore: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of each entry of a similarity matrix whose diagonal holds the pairs.

    With z_ij = 1 for positives and -1 for negatives:

        L_ij = -log σ(z_ij (S_ij / τ + b))

    The loss is the sum of all entries divided by B.

    Args:
        similarity: `(B, B)`, similarity of texts and audios in either order.
        temperature: τ > 0, a number or a 0-d tensor (learnable if it requires a gradient).
        bias: b, a number or a 0-d tensor (learnable if it requires a gradient).
        positives: `(B, B)` boolean, further positives beside the diagonal.
        ignore: `(B, B)` boolean; true entries count as 0. The diagonal is never ignored.

    Returns:
        `(B, B)`.

    References:
        SigLIP (Zhai et al., arXiv 2303.15343, Eq. 3, where t = 1/τ), which begins with t = 10, b = -10.

    Examples:
        >>> sigmoid_losses(torch.zeros(2, 2), bias=0.0)  # log 2
        tensor([[0.6931, 0.6931],
                [0.6931, 0.6931]])
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    positive = own if positives is None else own | positives
    logits = similarity / temperature + bias  # (B, B)
    losses = softplus(torch.where(positive, -logits, logits))
    return losses if ignore is None else losses.masked_fill(ignore & ~own, 0)
