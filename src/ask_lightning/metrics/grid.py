"""Embeddings and biases on a grid on which scores are exact. Axes: `C` clips, `N` rows, `d` width."""

import torch
from torch import Tensor

# Unit vectors are rounded to multiples of 2⁻²⁶ and held as whole numbers. A product of two components is
# then a whole number, and no partial sum of an inner product exceeds 2⁵³ (Cauchy–Schwarz), so float64
# holds every intermediate result exactly. Scores therefore do not depend on block shapes, summation
# order, threads, device, TF32 or autocast: equal embeddings tie exactly and the ranks are reproducible.
# The grid moves a cosine by about 1e-8, less than float32 rounding does.
_GRID = 2.0**26
# Rows that are brought onto the grid at a time where all of them would be copied more than once.
_ROWS_PER_PART = 1 << 13


def unit_on_grid(rows: Tensor) -> Tensor:
    """Rows `(N, d)` at unit length in whole multiples of the grid, as float64; rows of zeros stay zero."""
    rows = rows.double()
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # (N, 1)
    unit = rows / length.clamp_min(torch.finfo(rows.dtype).tiny)
    return unit.mul_(_GRID).round_()


def mean_direction(rows: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Mean direction of the rows of each group, `(num_groups, d)` on the grid.

    The sum is exact, so that it does not depend on the order of the rows.
    """
    total = rows.new_zeros(num_groups, rows.shape[1], dtype=torch.float64)
    return unit_on_grid(total.index_add_(0, group, unit_on_grid(rows)))


def mean_bias(bias: Tensor | None, group: Tensor, num_groups: int) -> Tensor | None:
    """Mean bias of each group, `(num_groups,)` float64 in whole multiples of the grid of scores.

    A score is a whole number of at most 2⁵² in size, so its difference to a bias in [-1, 1] is at most
    2⁵³ and exact. The difference to a larger bias is rounded once, to the same number in every block
    and on every device.
    """
    if bias is None:
        return None
    # Components have the coarser grid. On it the sum is exact, and does not depend on the order of rows.
    on_grid = bias.double().mul(_GRID).round_()
    total = on_grid.new_zeros(num_groups).index_add_(0, group, on_grid)
    return (total / group.bincount(minlength=num_groups)).mul_(_GRID).round_()


def unit_rows(rows: Tensor) -> Tensor:
    """Rows at unit length, in float64 and rounded so that their inner products are exact.

    Args:
        rows: Embeddings `(N, d)` of any floating dtype and length.

    Returns:
        `(N, d)` float64; rows of zeros stay zero.

    Examples:
        >>> unit_rows(torch.tensor([[3.0, 0.0]]))
        tensor([[1., 0.]], dtype=torch.float64)
    """
    # In parts, so that a bank of training pairs is not held in float64 several times over.
    parts = [unit_on_grid(part).div_(_GRID) for part in rows.split(_ROWS_PER_PART)]
    return torch.cat(parts)


def unit_clips(audio: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The embedding of each clip, the mean direction of its rows as in `retrieval_ranks`.

    Args:
        audio: Audio embeddings `(N, d)` of any floating dtype and length.
        clip_ids: Ids of the clips, `(N,)` integers.

    Returns:
        Unit vectors of the clips in the order of their ids, `(C, d)` as `unit_rows` returns them, and the
        number of each row's clip, `(N,)`.

    Examples:
        >>> audio = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
        >>> clips, clip_of = unit_clips(audio, torch.tensor([7, 3, 7]))
        >>> clip_of, clips.tolist()
        (tensor([1, 0, 1]), [[0.0, 1.0], [1.0, 0.0]])
    """
    ids, clip_of = torch.unique(clip_ids, return_inverse=True)
    return mean_direction(audio, clip_of, len(ids)).div_(_GRID), clip_of
