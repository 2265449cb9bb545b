"""Random streams and buffers at one moment of a run, to which they can be brought back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

RandomSource = torch.Generator | random.Random | np.random.Generator | np.random.RandomState
"""A random stream that somebody holds."""


class RandomState:
    """The global random streams of Python, NumPy and torch (CPU and CUDA), and others, as they are now.

    Args:
        sources: Further random streams.
    """

    def __init__(self, sources: Iterable[RandomSource] = ()) -> None:
        # Lightning's `isolate_rng` does not restore after an exception such as Ctrl-C.
        self._restore: list[Callable[[], Any]] = [
            partial(random.setstate, random.getstate()),
            partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
            partial(torch.set_rng_state, torch.get_rng_state()),
            *(restorer(source) for source in sources),
        ]
        if torch.cuda.is_initialized():
            self._restore.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))

    def restore(self) -> None:
        """Put all streams back to where they were."""
        for restore in self._restore:
            restore()


def random_streams() -> tuple[Any, ...]:
    """The global random streams as they are now, to be compared."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    streams = [state.numpy().tobytes() for state in (torch.get_rng_state(), *on_devices)]
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest), *streams


def restorer(source: RandomSource) -> Callable[[], Any]:
    """A function that puts a random stream back to where it is now.

    Args:
        source: The random stream.
    """
    if isinstance(source, torch.Generator):
        return partial(source.set_state, source.get_state())
    if isinstance(source, random.Random):
        return partial(source.setstate, source.getstate())
    if isinstance(source, np.random.RandomState):
        return partial(source.set_state, source.get_state())
    return partial(setattr, source.bit_generator, "state", source.bit_generator.state)


class PlainState:
    """Numbers, flags, strings and Nones among the attributes of a module, and in the groups of optimisers.

    Args:
        module: Module with the attributes; those of its parts belong to it.
        optimizers: The optimisers, whose groups hold learning rates.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        places: list[dict[str, Any]] = [vars(part) for part in module.modules()]
        places += [group for optimizer in optimizers for group in optimizer.param_groups]
        self._places = [(place, set(place), _plain_values(place)) for place in places]

    def restore(self) -> None:
        """Put these values back, and remove plain ones under new names; all else stays as it is."""
        for place, names, values in self._places:
            for name in _plain_values(place).keys() - names:
                del place[name]
            place.update(values)


def _plain_values(place: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in place.items() if isinstance(value, int | float | str | None)}


class BufferState:
    """The buffers of a module as they are now, with copies of their values.

    Args:
        module: Module whose buffers they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [
            (part, name, buffer, buffer.detach().clone())
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    @property
    def values(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Owner, name in the owner and value of each buffer."""
        return ((part, name, values) for part, name, _, values in self._owners)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the module these buffers with these values; those that have not changed are not written to."""
        for part, name, buffer, values in self._owners:
            part._buffers[name] = buffer  # somebody may have put another tensor there
            if not torch.equal(buffer, values):
                buffer.copy_(values)
