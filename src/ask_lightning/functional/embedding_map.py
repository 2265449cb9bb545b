"""Linear maps from embeddings of an older encoder to those of a newer one.

Axes: `n` rows that both have embedded, `N` other rows, `d` width, `r` rank.
"""

import torch
from torch import Tensor

from ask_lightning.utilities.arguments import check_count, check_positive


def orthogonal_map(old: Tensor, new: Tensor) -> Tensor:
    """The rotation or reflection that takes old embeddings nearest to new ones: orthogonal Procrustes.

        W = argmin ‖old W - new‖²  subject to  Wᵀ W = 1,   W = P Qᵀ with P Σ Qᵀ = oldᵀ new

    (Schönemann 1966). It keeps all inner products among mapped rows, so it can follow a common turn of the
    space and nothing else. Directions that no row has stay as they are.

    Args:
        old: `(n, d)`, embeddings of some rows by the older encoder.
        new: `(n, d)`, those of the same rows by the newer one.

    Returns:
        W, `(d, d)`: mapped rows are `rows @ W`.

    Examples:
        >>> old = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> orthogonal_map(old, torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).round(decimals=3)
        tensor([[ 0.,  1.],
                [-1.,  0.]])
    """
    # A trace of the identity decides what the data leave open, where there are fewer rows than dimensions.
    covariance = old.T @ new  # (d, d)
    scale = torch.linalg.matrix_norm(covariance).clamp_min(torch.finfo(old.dtype).tiny)
    anchor = 1e-6 * scale * torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    left, _, right = torch.linalg.svd(covariance + anchor)
    rotation: Tensor = left @ right
    return rotation


def ridge_map(old: Tensor, new: Tensor, rotation: Tensor, *, rank: int, ridge: float = 1e-2) -> Tensor:
    """A rotation and a correction of low rank to it, by ridge regression of what the rotation leaves.

        M = W + [Δ]ᵣ,   Δ = argmin ‖old Δ - (new - old W)‖² + λ ‖Δ‖²,   λ = ridge · ‖old‖² / d

    with the rotation W and [Δ]ᵣ the best approximation of rank r to what Δ predicts for the rows
    (reduced-rank regression).

    Args:
        old: `(n, d)`, embeddings of some rows by the older encoder.
        new: `(n, d)`, those of the same rows by the newer one.
        rotation: W `(d, d)`, what `orthogonal_map` makes of both.
        rank: r, largest rank of the correction, at least 1; more than d is d.
        ridge: Weight of the penalty in units of the mean square of a column of `old`, above 0.

    Returns:
        M, `(d, d)`: mapped rows are `rows @ M`.

    Raises:
        ValueError: `rank` or `ridge` is outside its range.

    Examples:
        >>> old = torch.eye(2)
        >>> ridge_map(old, 2 * old, orthogonal_map(old, 2 * old), rank=2, ridge=1e-6)
        tensor([[2.0000, 0.0000],
                [0.0000, 2.0000]])
    """
    check_count("rank", rank, 1)
    check_positive("ridge", ridge)
    width = old.shape[1]
    penalty = ridge * old.square().sum() / width
    identity = torch.eye(width, dtype=old.dtype, device=old.device)
    correction: Tensor = torch.linalg.solve(old.T @ old + penalty * identity, old.T @ (new - old @ rotation))
    if rank >= width:
        return rotation + correction
    # The leading directions of the predictions are the eigenvectors of their d × d products.
    predicted = old @ correction  # (n, d)
    _, directions = torch.linalg.eigh(predicted.T @ predicted)
    leading: Tensor = directions[:, -rank:]  # (d, r)
    return rotation + correction @ leading @ leading.T
