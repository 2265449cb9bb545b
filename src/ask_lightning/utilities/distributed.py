"""What the processes of a run ("ranks") tell each other. With one process everything returns at once.

Axes: `R` ranks, `n` rows of one rank, `N` rows of all, `d` width.
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

# Words between ranks travel in a group of their own, on the CPU, in which nobody gives up on a rank that is
# merely slow. A process that died closes its connections, which the others notice at once; a machine without
# power or network closes none.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, as one of them sees them.

    All methods are collective: every rank has to call them, in the same order.

    Attributes:
        rank: Number of this process.
        size: R, number of processes.

    Examples:
        >>> Ranks().gather(torch.ones(2))
        [tensor([1., 1.])]
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's default process group; this process alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def exchange(self, word: Any) -> list[Any]:
        """What each rank says, in the order of ranks; any small object that can be pickled.

        Waits for the slowest rank without a time-out.
        """
        if self.size == 1:
            return [word]
        words: list[Any] = [None] * self.size
        dist.all_gather_object(words, word, group=_patient_group())
        return words

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Work of this rank's own after which all ranks go on, or none does.

        Args:
            doing: What the ranks do, for the message.

        Raises:
            BaseException: On a rank that failed, its own error.
            RuntimeError: On the others, naming the first rank that failed.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            self.exchange(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.exchange(None)):
            if failure is not None:
                raise RuntimeError(f"Rank {rank} failed while {doing}. {failure}")

    def agree(self, word: Any, about: str) -> None:
        """Make sure that something is the same on every rank.

        Args:
            word: Any small object.
            about: What it is, for the error.

        Raises:
            RuntimeError: It differs.
        """
        words = self.exchange(word)
        if any(other != words[0] for other in words):
            listed = ", ".join(f"rank {rank}: {other}" for rank, other in enumerate(words))
            raise RuntimeError(
                f"The ranks do not agree about {about} ({listed}). They have to see the same source and the "
                "same weights: check that neither depends on the rank."
            )

    def share(self, tensor: Tensor) -> None:
        """Give every rank the values of rank 0, in place."""
        if self.size > 1:
            values = tensor.detach().contiguous()  # gloo ignores strides, NCCL refuses them
            dist.broadcast(values, src=0)
            tensor.detach().copy_(values)

    def gather(self, rows: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """The rows of each rank, without gradient.

        Args:
            rows: `(n, ...)` of this rank; n may differ between ranks, the other axes may not.
            counts: How many rows each rank has, where that is known; else the ranks tell each other.

        Returns:
            R tensors in the order of ranks, on the device of `rows`.
        """
        if self.size == 1:
            return [rows]
        if counts is None:
            counts = self.counts(len(rows), rows.device)
        longest = max(counts)
        # Collectives want equal shapes.
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = rows.new_empty((self.size * longest, *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, padded)
        return [gathered[rank * longest :][:count] for rank, count in enumerate(counts)]

    def counts(self, count: int, device: torch.device) -> list[int]:
        """A number of each rank, over the wires that tensors of `device` take."""
        if self.size == 1:
            return [count]
        everyone = torch.zeros(self.size, dtype=torch.int64, device=device)
        everyone[self.rank] = count
        dist.all_reduce(everyone)
        numbers: list[int] = everyone.tolist()
        return numbers

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, added in the order of ranks: the same bits everywhere."""
        if self.size == 1:
            return values
        if not values.is_floating_point():  # exact in any order
            total = values.clone()
            dist.all_reduce(total)
            return total
        parts = torch.stack(self.gather(values.unsqueeze(0), [1] * self.size)).squeeze(1)  # (R, ...)
        return parts.sum(dim=0)

    def maximum(self, values: Tensor) -> Tensor:
        """The element-wise maximum over ranks."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def deal(
        self, rows: Tensor, counts: Sequence[int], arriving: Sequence[int] | None = None
    ) -> tuple[Tensor, Sequence[int]]:
        """Send the first `counts[0]` rows to rank 0, the next `counts[1]` to rank 1, and so on.

        Args:
            rows: `(n, ...)` with n the sum of `counts`.
            counts: How many rows each rank shall get.
            arriving: How many rows each rank sends here, where that is known; else the ranks tell each other.

        Returns:
            What this rank was sent, in the order of senders, and how many rows came from each.
        """
        if self.size == 1:
            return rows, counts
        if arriving is None:
            table = torch.zeros(self.size, self.size, dtype=torch.int64, device=rows.device)
            table[self.rank] = torch.tensor(counts, dtype=torch.int64)
            dist.all_reduce(table)
            arriving = table[:, self.rank].tolist()
        received = rows.new_empty((sum(arriving), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), list(arriving), list(counts))
        return received, arriving


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        parts = ranks.gather(rows.detach())
        ctx.ranks, ctx.start = ranks, sum(len(part) for part in parts[: ranks.rank])
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss depends on this rank's rows; DDP's mean over ranks then makes the gradient of the
        # mean loss out of the sum.
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count], None


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks as one tensor, with gradients back to the rank that each row came from.

    The gradient that a row receives is the sum of what all ranks' losses send to it, which makes this the
    true adjoint: where DDP averages the parameters' gradients over ranks, a loss that every rank computes on
    the gathered rows has the gradient that one process would compute on them.

    Args:
        rows: `(n, ...)`; n may differ between ranks.

    Returns:
        `(N, ...)` in the order of ranks. The same tensor where there is one process.

    Examples:
        >>> gather_rows(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    ranks = Ranks.current()
    if ranks.size == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, ranks)  # type: ignore[no-untyped-call]
    return gathered


_patient: tuple[Any, Any] | None = None


def _patient_group() -> Any:
    """A gloo group of all ranks beside the present default group."""
    global _patient
    world = dist.group.WORLD
    if _patient is None or _patient[0] is not world:
        _patient = (world, dist.new_group(backend="gloo", timeout=_PATIENCE))
    return _patient[1]
