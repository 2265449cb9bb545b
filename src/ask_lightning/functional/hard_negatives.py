"""NT-Xent with reweighted negatives over a similarity matrix. Axes: `B` batch."""

import math

import torch
from torch import Tensor

from ask_lightning.functional.contrastive import without_empty_rows


def negative_weights(
    similarity: Tensor, temperature: float | Tensor, hardness: float, left_out: Tensor
) -> Tensor:
    """Weights of the negatives of each row that grow with their similarity, with a mean of 1.

    With N_i the negatives of row i and β the hardness:

        w_ij = |N_i| exp(β S_ij / τ) / Σ_{k ∈ N_i} exp(β S_ik / τ)

    Args:
        similarity: `(B, B)`, similarity of query i (row) and candidate j (column).
        temperature: τ > 0, a number or a 0-d tensor.
        hardness: β ≥ 0. 0: all weights are 1.
        left_out: `(B, B)` boolean, true for candidates that are no negatives.

    Returns:
        `(B, B)`; 0 for what is no negative.

    Examples:
        >>> pairs = torch.eye(3, dtype=torch.bool)
        >>> negative_weights(torch.tensor([[1.0, 0.0, 0.0]] * 3), 1.0, 0.5, pairs)
        tensor([[0.0000, 1.0000, 1.0000],
                [1.2449, 0.0000, 0.7551],
                [1.2449, 0.7551, 0.0000]])
    """
    count = (~left_out).sum(dim=1, keepdim=True)  # (B, 1)
    scores = (hardness * similarity / temperature).masked_fill(left_out, -torch.inf)
    return (count * scores.softmax(dim=1)).masked_fill(left_out, 0)


def hard_negative_nt_xent(
    similarity: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    hardness: float = 0.1,
    positive_weight: float = 1.0,
    positive_prior: float = 0.0,
    positives: Tensor | None = None,
    ignore: Tensor | None = None,
) -> Tensor:
    """NT-Xent of each row whose negatives count the more, the more similar they are to the query.

    With P_i the positives of row i, N_i its negatives, w_ij the weights of `negative_weights`, α the weight
    of the positives and τ⁺ the prior probability that a negative is a positive:

        p_i = Σ_{j ∈ P_i} exp(S_ij / τ)
        n_i = max( (Σ_{j ∈ N_i} w_ij exp(S_ij / τ) - τ⁺ |N_i| p_i / |P_i|) / (1 - τ⁺),  |N_i| exp(-1 / τ) )
        L_i = -log( p_i / (α p_i + n_i) )

    The gradient goes through the weights as well. β = 0, α = 1 and τ⁺ = 0 is NT-Xent.

    Args:
        similarity: `(B, B)`, similarity in [-1, 1] of query i (row) and candidate j (column).
        temperature: τ > 0, a number or a 0-d tensor (learnable if it requires a gradient).
        hardness: β ≥ 0, how much the weights grow with similarity.
        positive_weight: α ≥ 0, the weight of the positives in the denominator.
        positive_prior: τ⁺ in [0, 1).
        positives: `(B, B)` boolean, further positives beside the diagonal.
        ignore: `(B, B)` boolean; true entries are neither positives nor negatives. The diagonal is never
            ignored.

    Returns:
        `(B,)`; 0 for a row without negatives.

    References:
        The weights and τ⁺ are those of Robinson et al. (arXiv 2010.04592), whose denominator has α = 1; α and
        the contrast between modalities are those of HN-NCE (Radenovic et al., arXiv 2301.02280); p_i as a
        sum over several positives is that of AuroLA's Hybrid-NCE (Xu et al., arXiv 2602.18010). The division
        of p_i by |P_i| where both τ⁺ and several positives are used is not published.

    Examples:
        >>> hard_negative_nt_xent(torch.zeros(2, 2), hardness=1.0)  # log 2
        tensor([0.6931, 0.6931])
    """
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    positive = own if positives is None else own | positives
    left_out = positive if ignore is None else positive | ignore
    logits = similarity / temperature
    attraction = logits.masked_fill(~positive, -torch.inf).logsumexp(dim=1)  # log p, (B,)
    log_count = (~left_out).sum(dim=1).clamp(min=1).to(logits.dtype).log()  # log |N|, (B,)

    def of_rows(negatives: Tensor) -> Tensor:
        absent = negatives == -torch.inf  # 0 times minus infinity would be no number
        weights = (hardness * negatives.masked_fill(absent, 0)).masked_fill(absent, -torch.inf)
        # log Σ w exp(S/τ), whose parts may be too large for numbers.
        repulsion = log_count + (weights + negatives).logsumexp(dim=1) - weights.logsumexp(dim=1)  # (B,)
        if positive_prior > 0:
            log_positives = positive.sum(dim=1).to(logits.dtype).log()  # log |P|, (B,)
            expected = math.log(positive_prior) + log_count + attraction - log_positives
            floor = log_count - 1 / temperature
            repulsion = _debiased(repulsion, expected, math.log1p(-positive_prior), floor)
        if positive_weight > 0:
            repulsion = torch.logaddexp(repulsion, math.log(positive_weight) + attraction)
        return repulsion - attraction

    return without_empty_rows(logits.masked_fill(left_out, -torch.inf), of_rows)


def _debiased(repulsion: Tensor, expected: Tensor, log_rest: float, floor: Tensor) -> Tensor:
    """`max((repulsion - expected) / rest, floor)` of numbers `(B,)` that are given by their logarithms."""
    gap = expected - repulsion
    exists = gap < 0
    # Where the difference is not positive its logarithm would be no number, in the gradient as well.
    difference = repulsion + torch.log(-torch.expm1(torch.where(exists, gap, -1.0))) - log_rest
    return torch.where(exists & (difference > floor), difference, floor)
