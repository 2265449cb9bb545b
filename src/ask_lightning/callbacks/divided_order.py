"""The order of a shuffled loader that Lightning draws as a whole and divides among processes.

With several processes Lightning puts a `DistributedSamplerWrapper` around samplers that it does not know,
such as that of torchdata's `StatefulDataLoader(shuffle=True)`. The state of the loader then counts the items
of an order, but no longer knows the order.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor


class DividedOrder:
    """Stands in for `reset`, by which Lightning draws an order, and notes what it is drawn from.

    Args:
        indices: Lightning's dataset of indices, whose sampler has a generator.

    Attributes:
        drawn_from: State of the generator before the last order was drawn; `None` before the first one.
        draw_from: State to draw every order from, while a loader is brought back to its place. `None`: the
            state that the generator has.
    """

    def __init__(self, indices: Any) -> None:
        self._indices = indices
        self.drawn_from: Tensor | None = None
        self.draw_from: Tensor | None = None

    @property
    def generator(self) -> torch.Generator:
        """The generator of the sampler."""
        return self._indices._sampler.generator  # type: ignore[no-any-return]

    def __call__(self) -> None:
        """Draw an order."""
        if self.draw_from is not None:
            self.generator.set_state(self.draw_from)
        self.drawn_from = self.generator.get_state()
        type(self._indices).reset(self._indices)


def watch_order(loader: object) -> None:
    """Note from now on what the orders of a loader are drawn from, if it is one that Lightning divides.

    Args:
        loader: Training loader.
    """
    if order_of(loader) is None and (indices := _divided_indices(loader)) is not None:
        indices.reset = DividedOrder(indices)


def order_of(loader: object) -> DividedOrder | None:
    """What watches the order of a loader, if anything does.

    Args:
        loader: Training loader.
    """
    watching = getattr(_divided_indices(loader), "reset", None)
    return watching if isinstance(watching, DividedOrder) else None


def sampler_of(loader: object) -> Any:
    """What a loader's batches are drawn from; the `sampler` of one with batches of its own is another one.

    Args:
        loader: Training loader.
    """
    batches = getattr(loader, "batch_sampler", None)
    return getattr(batches, "sampler", batches) or getattr(loader, "sampler", None)


def has_divided_order(loader: object) -> bool:
    """Whether Lightning divides the order of a loader, and draws it from a generator that can be watched.

    Args:
        loader: Training loader.
    """
    return _divided_indices(loader) is not None


def _divided_indices(loader: object) -> Any:
    """Lightning's dataset of the indices that it divides, if they are drawn from a generator."""
    sampler = sampler_of(loader)
    if not isinstance(sampler, DistributedSamplerWrapper):
        return None
    indices: Any = sampler.dataset
    generator = getattr(getattr(indices, "_sampler", None), "generator", None)
    return indices if isinstance(generator, torch.Generator) else None
