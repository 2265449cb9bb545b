"""The reliability potential, Eq. 11–13. Axes: `B` batch, `K` neighbours, `d` width."""

import torch
from torch import Tensor


def reliability_potential(embeddings: Tensor, crossed: Tensor, own: Tensor) -> Tensor:
    """How far the neighbours found by the other modality agree with those found by this one.

    Eq. 11–13 of the paper. For the text-to-audio side the embeddings are audio, `crossed` is the audio
    of the pairs that the *text* retrieved and `own` the audio of the pairs that the *audio* retrieved:

        s̄_j = mean_l X_j · U_l,   w = softmax_j(s̄),   Ψ = Σ_j w_j exp(u · X_j)

    With unit vectors Ψ lies in [1/e, e], so -log Ψ, the `F` of Eq. 16, lies in [-1, 1].

    Args:
        embeddings: `(B, d)`, the raw (not injected) embeddings u.
        crossed: `(B, K, d)`, the neighbours X retrieved through the other modality.
        own: `(B, K', d)`, the neighbours U[R_a] retrieved by the embeddings themselves.

    Returns:
        `(B,)`, Ψ of each sample. The weights w depend on the knowledge only.

    Examples:
        >>> u = torch.tensor([[1.0, 0.0]])
        >>> agreeing = torch.tensor([[[1.0, 0.0]]])
        >>> reliability_potential(u, agreeing, agreeing)  # e
        tensor([2.7183])
    """
    consensus = own.mean(dim=1)  # (B, d)
    weights = torch.softmax(torch.einsum("bkd,bd->bk", crossed, consensus), dim=1)  # (B, K)
    affinity = torch.einsum("bkd,bd->bk", crossed, embeddings)  # (B, K)
    return (weights * affinity.exp()).sum(dim=1)  # (B,)
