"""The reliability potential, Eq. 11–13, and how it enters the loss, Eq. 16–19 and 21.

Axes: `B` batch, `K` neighbours, `d` width.
"""

from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import Any, Literal

import torch
from torch import Tensor

ReliabilityForm = Literal["disagreement_factor", "agreement_factor", "disagreement_term", "agreement_term"]
"""What enters the loss, -log Ψ (disagreement) or log Ψ (agreement), and how: as a factor or as a term."""


def reliability_potential(embeddings: Tensor, crossed: Tensor, own: Tensor) -> Tensor:
    """How far the neighbours found by the other modality agree with those found by this one.

    Eq. 11–13 of the paper. For the text-to-audio side the embeddings are audio, `crossed` is the audio
    of the pairs that the *text* retrieved and `own` the audio of the pairs that the *audio* retrieved:

        s̄_j = mean_l X_j · U_l,   w = softmax_j(s̄),   Ψ = Σ_j w_j exp(u · X_j)

    With unit vectors Ψ lies in [1/e, e], so -log Ψ, the `F` of Eq. 16, lies in [-1, 1].

    Args:
        embeddings: `(B, d)`, the raw (not injected) embeddings u.
        crossed: `(B, K, d)`, the neighbours X retrieved through the other modality.
        own: `(B, K', d)`, the neighbours U[R_a] retrieved by the embeddings themselves, or `(B, d)`, their
            mean over K', which is all that counts of them.

    Returns:
        `(B,)`, Ψ of each sample. The weights w depend on the knowledge only.

    Examples:
        >>> u = torch.tensor([[1.0, 0.0]])
        >>> agreeing = torch.tensor([[[1.0, 0.0]]])
        >>> reliability_potential(u, agreeing, agreeing)  # e
        tensor([2.7183])
    """
    consensus = own.mean(dim=1) if own.ndim == 3 else own  # (B, d)
    if crossed.requires_grad or consensus.requires_grad:
        return _weighted_affinities(embeddings, crossed, consensus).sum(dim=1)  # (B,)
    potential: Tensor = _PotentialOfEmbeddings.apply(embeddings, crossed, consensus)  # type: ignore[no-untyped-call]
    return potential


def _weighted_affinities(embeddings: Tensor, crossed: Tensor, consensus: Tensor) -> Tensor:
    """The terms `w_j exp(u · X_j)` of Ψ, `(B, K)`."""
    # One product reads the neighbours once. In this layout it runs several times faster on a CPU than two.
    both = torch.bmm(crossed, torch.stack([consensus, embeddings], dim=1).mT)  # (B, K, 2)
    agreement, affinity = both.unbind(dim=2)  # (B, K) each
    return torch.softmax(agreement, dim=1) * affinity.exp()


class _PotentialOfEmbeddings(torch.autograd.Function):
    """Ψ with a gradient to the embeddings alone, `Σ_j w_j exp(u · X_j) X_j`, and none to what is stored."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, crossed: Tensor, consensus: Tensor) -> Tensor:
        weighted = _weighted_affinities(embeddings, crossed, consensus)  # (B, K)
        ctx.save_for_backward(embeddings, crossed, consensus, weighted)
        return weighted.sum(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        *inputs, weighted = ctx.saved_tensors
        crossed = inputs[1]
        if torch.is_grad_enabled():  # for gradients of this gradient
            weighted = _weighted_affinities(*inputs)
        of_neighbors = (gradient[:, None] * weighted)[:, None]  # (B, 1, K)
        return torch.bmm(of_neighbors, crossed.to(of_neighbors.dtype)).squeeze(1), None, None


def disagreement(potential: Tensor) -> Tensor:
    """The `F` of Eq. 16: `-log Ψ`, in [-1, 1] for unit vectors.

    Args:
        potential: Ψ, any shape.

    Returns:
        F in the same shape; the larger, the less the two modalities' neighbours agree.

    Examples:
        >>> disagreement(torch.tensor([1.0, 2.7182817]))
        tensor([-0., -1.])
    """
    return -potential.log()


def reliability_penalty(potential: Tensor, form: ReliabilityForm = "disagreement_factor") -> Tensor:
    """What a form of the reliability weighs by λ: -log Ψ, or log Ψ.

    Eq. 16–18 of the paper take -log Ψ; Eq. 21 and 33–34 have log Ψ.

    Args:
        potential: Ψ, any shape.
        form: `"disagreement_factor"` or `"disagreement_term"` for -log Ψ, `"agreement_factor"` or
            `"agreement_term"` for log Ψ.

    Returns:
        F in the same shape.

    Examples:
        >>> reliability_penalty(torch.tensor(2.7182817), "agreement_term")
        tensor(1.)
    """
    return disagreement(potential) if form.startswith("disagreement") else potential.log()


def reliability_term(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The sum `Σ_g λ_g F_g`, which Eq. 21 and 33–34 add to the cross-entropy of each sample.

    Args:
        weighted: Pairs `(λ_g, F_g)` of each granularity, see `reliability_penalty`; all F of one shape.

    Returns:
        The term in the shape of F.

    Examples:
        >>> reliability_term([(0.2, torch.tensor(-1.0)), (0.3, torch.tensor(0.5))])
        tensor(-0.0500)
    """
    return reduce(add, (weight * term for weight, term in weighted))


def modulation_factor(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The factor `1 + Σ_g λ_g F_g` by which Eq. 16–19 weigh the cross-entropy of a direction.

    Args:
        weighted: Pairs `(λ_g, F_g)` of each granularity, see `reliability_penalty`; all F of one shape.

    Returns:
        The factor in the shape of F. It is positive if the λ sum to less than 1 and all vectors have at most
        unit length.

    Examples:
        >>> modulation_factor([(0.2, torch.tensor(-1.0)), (0.3, torch.tensor(0.5))])
        tensor(0.9500)
    """
    return 1 + reliability_term(weighted)
