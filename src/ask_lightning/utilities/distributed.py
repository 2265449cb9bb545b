"""Collective operations of the processes of a run ("ranks"). With one process each returns at once.

Axes: `R` ranks, `n` rows of one rank, `N` rows of all ranks, `d` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Objects are exchanged over a CPU group of their own whose time-out is so long that a rank that is merely
# slow never meets it. A process that dies closes its connections, which the others notice at once; only a
# machine that loses power or network makes them wait.
_LONG_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, as one of them sees them.

    All methods are collective: every rank has to call them, in the same order.

    Attributes:
        rank: Number of this process, from 0 to R - 1.
        size: R, the number of processes.

    Examples:
        >>> Ranks().all_gather(torch.ones(2))
        [tensor([1., 1.])]
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of torch's default process group, or this process alone where there is no group."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def all_gather_object(self, item: Any) -> list[Any]:
        """Exchange small Python objects; the slowest rank is waited for without a practical time-out.

        Args:
            item: The object of this rank; it has to be picklable.

        Returns:
            The R objects in the order of ranks.
        """
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=_gloo_group_with_long_timeout())
        return items

    @contextmanager
    def all_or_none(self, action: str) -> Iterator[None]:
        """Run a block after which either all ranks go on, or all raise an error.

        Args:
            action: What the block does, as it completes the sentence "Rank 1 failed while …".

        Raises:
            BaseException: The block's own error, on a rank where it failed.
            RuntimeError: On the other ranks, naming the first rank that failed and its error.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            self.all_gather_object(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.all_gather_object(None)):
            if failure is not None:
                raise RuntimeError(f"Rank {rank} failed while {action}. {failure}")

    def require_equal(self, value: Any, description: str) -> None:
        """Refuse a value that differs between ranks.

        Args:
            value: The value of this rank, a small picklable object.
            description: What the value is, for the error message.

        Raises:
            RuntimeError: The value differs between ranks; the message lists all of them.
        """
        values = self.all_gather_object(value)
        if any(other != values[0] for other in values):
            listed = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(values))
            raise RuntimeError(
                f"The ranks do not agree about {description} ({listed}). They have to see the same source "
                "and the same weights: check that neither depends on the rank, and that nothing was unfrozen "
                "which was frozen when DDP began, since DDP does not average its gradient."
            )

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor in place with the values that it has on rank 0.

        Args:
            tensor: Any tensor, also a view with strides; its shape has to be the same on every rank.
        """
        if self.size > 1:
            values = tensor.detach().contiguous()  # gloo ignores strides, NCCL refuses them
            dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def all_gather(self, rows: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """Collect the rows of every rank, without gradient.

        Args:
            rows: `(n, ...)`, the rows of this rank; n may differ between ranks, the other axes may not.
            counts: The number of rows of each rank, if it is known; otherwise it is exchanged first.

        Returns:
            R tensors in the order of ranks, on the device of `rows`.
        """
        if self.size == 1:
            return [rows]
        if counts is None:
            counts = self.all_gather_count(len(rows), rows.device)
        longest = max(counts)
        # The collective needs equal shapes.
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = rows.new_empty((self.size * longest, *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, padded)
        return [gathered[rank * longest :][:count] for rank, count in enumerate(counts)]

    def all_gather_count(self, count: int, device: torch.device) -> list[int]:
        """Collect one integer from every rank.

        Args:
            count: The integer of this rank.
            device: Device whose tensors the process group can send.

        Returns:
            The R integers in the order of ranks.
        """
        if self.size == 1:
            return [count]
        counts = torch.zeros(self.size, dtype=torch.int64, device=device)
        counts[self.rank] = count
        dist.all_reduce(counts)
        gathered: list[int] = counts.tolist()
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over ranks, always in the order of ranks, so that every rank gets the same bits."""
        if self.size == 1:
            return values
        if not values.is_floating_point():  # exact in any order
            total = values.clone()
            dist.all_reduce(total)
            return total
        parts = torch.stack(self.all_gather(values.unsqueeze(0), [1] * self.size)).squeeze(1)  # (R, ...)
        return parts.sum(dim=0)

    def maximum(self, values: Tensor) -> Tensor:
        """Take the element-wise maximum of a tensor over ranks."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def all_to_all(
        self, rows: Tensor, counts: Sequence[int], received_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Sequence[int]]:
        """Send the first `counts[0]` rows to rank 0, the next `counts[1]` to rank 1, and so on.

        Args:
            rows: `(n, ...)` with n the sum of `counts`.
            counts: The number of rows to send to each rank.
            received_counts: The number of rows that each rank sends here, if it is known; otherwise it is
                exchanged first.

        Returns:
            The received rows in the order of their senders, and the number of rows from each sender.
        """
        if self.size == 1:
            return rows, counts
        if received_counts is None:
            table = torch.zeros(self.size, self.size, dtype=torch.int64, device=rows.device)
            table[self.rank] = torch.tensor(counts, dtype=torch.int64)
            dist.all_reduce(table)
            received_counts = table[:, self.rank].tolist()
        received = rows.new_empty((sum(received_counts), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), list(received_counts), list(counts))
        return received, received_counts


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        parts = ranks.all_gather(rows.detach())
        ctx.ranks, ctx.start = ranks, sum(len(part) for part in parts[: ranks.rank])
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss depends on this rank's rows. DDP then averages over ranks, which turns this sum
        # into the gradient of the mean loss.
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count], None


def all_gather_with_gradient(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks; gradients flow back to the rank that each row came from.

    The gradient of a row is the sum of the gradients of all ranks' losses, so this is the true adjoint of
    the gathering: where DDP averages the parameters' gradients over ranks, a loss that every rank computes
    on the gathered rows has the gradient that one process would compute on them.

    Args:
        rows: `(n, ...)`, the rows of this rank; n may differ between ranks.

    Returns:
        `(N, ...)` in the order of ranks; `rows` itself where there is one process.

    Examples:
        >>> all_gather_with_gradient(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    ranks = Ranks.current()
    if ranks.size == 1:
        return rows
    gathered: Tensor = _AllGatherRows.apply(rows, ranks)  # type: ignore[no-untyped-call]
    return gathered


_group_of_world: tuple[Any, Any] | None = None


def _gloo_group_with_long_timeout() -> Any:
    """A gloo group of all ranks, made once for each default process group."""
    global _group_of_world
    world = dist.group.WORLD
    if _group_of_world is None or _group_of_world[0] is not world:
        _group_of_world = (world, dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT))
    return _group_of_world[1]
