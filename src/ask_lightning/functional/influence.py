"""Out-of-batch influence OBI, Eq. 2. Axes: `B` batch, `K` neighbours, `N` pairs, `d` width."""

from collections.abc import Sequence

import torch
from torch import Tensor


def out_of_batch_influence(
    loss: Tensor,
    audio: Sequence[tuple[Tensor, Tensor]],
    text: Sequence[tuple[Tensor, Tensor]],
    num_rows: int,
) -> Tensor:
    """How strongly a loss depends on pairs outside the batch.

    Eq. 2 of the paper: `OBI = mean_k ( ‖∂L/∂U_k‖₂ + ‖∂L/∂V_k‖₂ )` over the rows of the knowledge base.
    Only rows that were looked up can have a gradient, so the gradients of the looked-up copies are added
    up by row instead of differentiating through the whole base.

    Args:
        loss: The loss, 0-d, with its graph, which is kept.
        audio: Pairs `(rows, vectors)` of looked-up audio: row numbers `(B, K)` in the base, and vectors
            `(B, K, d)` that require a gradient.
        text: Pairs `(rows, vectors)` of looked-up text, in the same form.
        num_rows: N, the number of rows over which the mean is taken.

    Returns:
        0-d, without a gradient. Exactly 0 for a loss that uses the batch only.

    Examples:
        >>> vectors = torch.ones(1, 2, 3, requires_grad=True)
        >>> rows = torch.tensor([[0, 7]])
        >>> out_of_batch_influence(vectors.sum(), [(rows, vectors)], [], num_rows=10)  # 2 · √3 / 10
        tensor(0.3464)
    """
    return (_gradient_norms(loss, audio) + _gradient_norms(loss, text)) / num_rows


def _gradient_norms(loss: Tensor, looked_up: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum, over the rows of one modality, of the norms of their gradients."""
    if not looked_up or not loss.requires_grad:
        return loss.new_zeros(())
    rows, vectors = zip(*looked_up, strict=True)
    gradients = torch.autograd.grad(
        loss, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    flat = torch.cat([gradient.flatten(end_dim=-2) for gradient in gradients])  # (ΣBK, d)
    unique, position = torch.cat([row.flatten() for row in rows]).unique(return_inverse=True)
    per_row = flat.new_zeros(len(unique), flat.shape[-1]).index_add_(0, position, flat)
    total: Tensor = torch.linalg.vector_norm(per_row, dim=-1).sum()
    return total
