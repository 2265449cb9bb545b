"""Evenly spaced rows, to look at some of many."""

import torch
from torch import Tensor


def evenly_spaced(size: int, most: int) -> Tensor:
    """Evenly spaced rows from the first to the last.

    Args:
        size: Number of rows there are, at least 1.
        most: Largest number of rows to take, at least 1.

    Returns:
        `(min(size, most),)` int64 on the CPU, ascending and distinct.

    Examples:
        >>> evenly_spaced(10, 4), evenly_spaced(2, 4)
        (tensor([0, 3, 6, 9]), tensor([0, 1]))
    """
    # Float32 has not all of the numbers of more than 2²⁴ rows.
    return torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).long()
