"""`DeferredCheck`: a check of a number that a GPU computes, without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DeferredCheck:
    """Checks numbers of a running computation, on a CPU at once and on a GPU as soon as they have arrived.

    Reading a number of a GPU waits until all work before it is done. Here it is copied to the host in the
    background, and checked in a later call, when the copy has arrived: an error comes a step late, and costs
    nothing. Numbers that come while a copy is on its way are left out.

    Examples:
        >>> def refuse_negative(value):
        ...     if value < 0:
        ...         raise ValueError(f"{value} is negative.")
        >>> DeferredCheck()(torch.tensor(-1.0), refuse_negative)
        Traceback (most recent call last):
        ValueError: -1.0 is negative.
    """

    def __init__(self) -> None:
        self._underway: tuple[Tensor, torch.cuda.Event, Callable[[float], None]] | None = None

    def __reduce__(self) -> tuple[type[DeferredCheck], tuple[()]]:
        # Copies of a loss, and those that travel to other processes, start without a number underway.
        return type(self), ()

    def __call__(self, value: Tensor, check: Callable[[float], None]) -> None:
        """Check a number, and before that the one that is underway, if it has arrived.

        Args:
            value: 0-d tensor.
            check: Function that raises if it is given a number that is not allowed.
        """
        if torch.compiler.is_compiling():  # copies and events that outlast the call are not for a graph
            torch.compiler.disable(self._check)(value, check)
        else:
            self._check(value, check)

    def _check(self, value: Tensor, check: Callable[[float], None]) -> None:
        """Check the number that is underway and this one, or send this one."""
        self.finish()
        if not value.is_cuda:
            check(float(value.detach()))
        elif self._underway is None:
            on_host = torch.empty((), dtype=value.dtype, pin_memory=True)
            on_host.copy_(value.detach(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(value.device))
            self._underway = on_host, arrived, check

    def finish(self) -> None:
        """Check the number that is underway, if it has arrived."""
        if self._underway is None or not self._underway[1].query():
            return
        on_host, _, check = self._underway
        self._underway = None
        check(float(on_host))
