"""A queue of the embeddings of earlier batches. Axes: `n` rows in the queue, `B` rows that enter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ask_lightning.utilities.arguments import check_count


class EmbeddingQueue:
    """The last rows of several columns, first in, first out.

    It is no module, so that nobody trains, averages or broadcasts it. Its tensors are never written to: a
    graph that has read the queue stays valid when rows enter. Embeddings with NaN or Inf enter as zeros, so
    that one broken batch does not spoil those after it.

    Args:
        size: The largest number of rows, at least 1.

    Examples:
        >>> queue = EmbeddingQueue(3)
        >>> queue.push(ids=torch.tensor([1, 2]))
        >>> queue.push(ids=torch.tensor([3, 4]))
        >>> queue.column("ids", like=torch.tensor([0])).tolist()
        [2, 3, 4]
    """

    def __init__(self, size: int) -> None:
        check_count("size", size)
        self.size = size
        self._columns: dict[str, Tensor] = {}
        # What the last push changed: how many rows entered, and the rows that they put out.
        self._num_entered = 0
        self._put_out: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()))) if self._columns else 0

    @property
    def is_full(self) -> bool:
        """Whether each row that enters puts one out."""
        return len(self) == self.size

    def column(self, name: str, like: Tensor) -> Tensor:
        """The rows of one column, the oldest first.

        Args:
            name: Name under which the column was pushed.
            like: Tensor `(B, ...)` of the column's kind, which gives device and dtype, and the width of an
                empty queue.

        Returns:
            `(n, ...)` without gradient.
        """
        rows = self._columns.get(name)
        return like.detach()[:0] if rows is None else rows.to(like)

    def push(self, **columns: Tensor) -> None:
        """Let rows enter, behind those that are there.

        Args:
            columns: `(B, ...)` each, the same columns each time; without their gradient.

        Raises:
            ValueError: The columns or their widths are others than those of the rows in the queue.
        """
        before, now = (
            {name: tuple(rows.shape[1:]) for name, rows in side.items()} for side in (self._columns, columns)
        )
        if before and before != now:
            raise ValueError(
                f"The queue holds rows of {_describe(before)}, but a batch brings {_describe(now)}. Pass ids "
                "with every batch or with none, and start a new run where the width has changed."
            )
        entering = {name: _finite(rows.detach()[-self.size :]) for name, rows in columns.items()}
        older = {name: self.column(name, like=rows) for name, rows in entering.items()}
        self._num_entered = len(next(iter(entering.values())))
        surplus = max(0, len(self) + self._num_entered - self.size)
        self._put_out = {name: rows[:surplus].clone() for name, rows in older.items()}
        # Copies, as what was gathered may be a view of more.
        self._columns = {name: torch.cat([older[name][surplus:], rows]) for name, rows in entering.items()}

    def undo_push(self) -> None:
        """Put the rows that entered last out again, and those back that they had put out; once for a push."""
        if self._num_entered:
            self._columns = {
                name: torch.cat([self._put_out[name], rows[: -self._num_entered]])
                for name, rows in self._columns.items()
            }
        self._forget_push()

    def clear(self) -> None:
        """Forget all rows."""
        self._columns = {}
        self._forget_push()

    def _forget_push(self) -> None:
        self._num_entered, self._put_out = 0, {}

    def state_dict(self) -> dict[str, Tensor]:
        """The columns by name."""
        return dict(self._columns)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the columns of another queue; of a larger one, its newest rows.

        Args:
            state: The other queue's `state_dict`.
        """
        self._columns = {name: rows[-self.size :].clone() for name, rows in state.items()}
        self._forget_push()


def _finite(rows: Tensor) -> Tensor:
    """Rows `(B, ...)`, those with a number that is not finite as zeros."""
    if not rows.is_floating_point():
        return rows
    # Not left out, as a GPU would have to be waited for to know how many remain.
    return torch.where(rows.isfinite().all(dim=-1, keepdim=True), rows, 0)


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Columns and their shapes, for a message."""
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
