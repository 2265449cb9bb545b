"""Optimal transport between the batch's texts and audios, Eq. 15 and 36. Axes: `B` batch."""

from typing import Literal

import torch
from torch import Tensor

# Below this ε the exponentials of similarities in [-1, 1] leave float32's comfortable range.
_SMALLEST_EXPONENTIAL_EPSILON = 0.03


def sinkhorn_plan(
    similarity: Tensor, epsilon: float = 0.1, iterations: int = 50, *, bounded: bool = True
) -> Tensor:
    """The entropic transport plan that maximises similarity between uniform marginals.

    Eq. 15 of the paper:

        Q* = argmax_Q ⟨Q, S⟩ + ε H(Q)   subject to   Q 1 = 1/B,   Qᵀ 1 = 1/C

    by Sinkhorn–Knopp with a fixed number of iterations: no stopping test, so no synchronisation with
    the host. The last update is of the columns: column sums are exact, row sums converge.

    Computed in float32 (float64 for float64 input) whatever autocast is active. Differentiable through
    the iterations if `similarity` requires a gradient.

    Args:
        similarity: `(B, C)`, rows and columns any two sets; usually square.
        epsilon: ε > 0, the weight of the entropy. Large: uniform; small: a permutation.
        iterations: Number of row-and-column updates, at least 1.
        bounded: Promise that similarities lie in [-1, 1], as cosines do. Then ε ≥ 0.03 runs in the
            exponential domain, which is several times faster; otherwise the log domain is used.

    Returns:
        `(B, C)`, non-negative, total mass 1, in float32 or float64.

    Raises:
        ValueError: `epsilon` is not positive or `iterations` is below 1.

    Example:
        >>> plan = sinkhorn_plan(torch.eye(3), epsilon=0.1)
        >>> plan.sum(), plan.diagonal()
        (tensor(1.), tensor([0.3333, 0.3333, 0.3333]))
    """
    if not epsilon > 0:
        raise ValueError(f"Argument `epsilon` has to be positive, but got {epsilon}.")
    if iterations < 1:
        raise ValueError(f"Argument `iterations` has to be at least 1, but got {iterations}.")
    with torch.autocast(similarity.device.type, enabled=False):
        dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
        scaled = similarity.to(dtype) / epsilon  # (B, C)
        if not bounded or epsilon < _SMALLEST_EXPONENTIAL_EPSILON:
            return _log_domain(scaled, iterations)
        # The shift scales whole rows, which the first row update undoes; it keeps entries in (0, 1].
        kernel = (scaled - scaled.detach().amax(dim=1, keepdim=True)).exp()  # (B, C)
        if torch.is_grad_enabled() and kernel.requires_grad:
            rows, columns = _scalings(kernel, iterations)
        else:
            rows, columns = _scalings_in_place(kernel, iterations)
        return rows[:, None] * kernel * (columns / len(kernel.T))


def realign_similarity(
    similarity: Tensor,
    plan: Tensor,
    ot_factor: float = 0.2,
    *,
    plan_scaling: Literal["marginal", "row"] = "marginal",
) -> Tensor:
    """Move each query's similarities towards those of the queries that it is transported to.

    Eq. 15 of the paper: `S* = ((1 - β) I + β Q̂) S`. For the audio-to-text direction pass the
    transposes of both matrices.

    With `"marginal"`, the paper's text, the plan's rows sum to 1/B, so the transport term shrinks as 1/B
    and S* is close to (1 - β) S: mostly a higher temperature. With `"row"` the plan is scaled by B,
    its rows sum to 1, and β is the share of transport.

    Args:
        similarity: `(B, B)`, S.
        plan: `(B, B)`, Q* of total mass 1.
        ot_factor: β in [0, 1]. At 0 the similarity comes back unchanged.
        plan_scaling: `"marginal"` for Q̂ = Q*, `"row"` for Q̂ = B Q*.

    Returns:
        `(B, B)`.

    Example:
        >>> realign_similarity(torch.eye(2), torch.full((2, 2), 0.25), 0.5, plan_scaling="row")
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    if ot_factor == 0:
        return similarity
    scale = len(plan) if plan_scaling == "row" else 1
    return (1 - ot_factor) * similarity + (ot_factor * scale) * (plan @ similarity)


def _scalings(kernel: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Row and column scalings for marginals of 1/B and 1 (not 1/C: fewer operations a round)."""
    columns = kernel.new_ones(kernel.shape[1])
    for _ in range(iterations):
        rows = (kernel @ columns).reciprocal()
        columns = (kernel.T @ rows).reciprocal()
    return rows, columns


def _scalings_in_place(kernel: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The same without a graph: two products into buffers that are kept halve the time."""
    transposed = kernel.T
    rows, columns = kernel.new_empty(kernel.shape[0]), kernel.new_ones(kernel.shape[1])
    for _ in range(iterations):
        torch.mv(kernel, columns, out=rows).reciprocal_()
        torch.mv(transposed, rows, out=columns).reciprocal_()
    return rows, columns


def _log_domain(scaled: Tensor, iterations: int) -> Tensor:
    """The same updates on logarithms, for any ε and any range of similarities."""
    columns = scaled.new_zeros(scaled.shape[1])
    for _ in range(iterations):
        rows = -torch.logsumexp(scaled + columns, dim=1)
        columns = -torch.logsumexp(scaled + rows[:, None], dim=0)
    return (scaled + rows[:, None] + columns).exp() / scaled.shape[1]
