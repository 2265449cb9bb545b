"""When each stored row was encoded."""

from __future__ import annotations

import torch
from torch import Tensor


class RowAges:
    """The epoch in which each of the N rows of a base was encoded; the same on all ranks.

    Args:
        num_rows: N.
        epoch: Epoch in which all rows were encoded.

    Examples:
        >>> ages = RowAges(4, epoch=0)
        >>> ages.renew(torch.tensor([0, 1]), epoch=3)
        >>> ages.mean_and_max(epoch=4)
        (2.5, 4.0)
    """

    def __init__(self, num_rows: int, epoch: int) -> None:
        self.encoded_at = torch.full((num_rows,), epoch, dtype=torch.int32)

    @classmethod
    def from_state(cls, encoded_at: Tensor) -> RowAges:
        """The ages that a checkpoint holds.

        Args:
            encoded_at: `(N,)` int32, the epoch of each row.
        """
        ages = cls(0, 0)
        ages.encoded_at = encoded_at.cpu().clone()
        return ages

    def renew(self, rows: Tensor, epoch: int) -> None:
        """Note that some rows were encoded.

        Args:
            rows: Integer numbers of the rows.
            epoch: Present epoch.
        """
        self.encoded_at[rows.cpu()] = epoch

    def mean_and_max(self, epoch: int) -> tuple[float, float]:
        """The mean and the largest age, in epochs.

        Args:
            epoch: Present epoch.
        """
        ages = (epoch - self.encoded_at).double()
        return float(ages.mean()), float(ages.max())
