"""Which parts of a batch a model passes to its encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

# Mappings of tuples of tensors, and the like; deeper batches are not searched.
_DEPTH = 3


@dataclass(frozen=True)
class Part:
    """A place in a batch.

    Attributes:
        path: Keys, indices and field names that lead to the place; empty for the whole batch.
    """

    path: tuple[Any, ...]

    def of(self, batch: Any) -> Any:
        """The part of a batch that lies in this place."""
        for key in self.path:
            batch = getattr(batch, key) if is_dataclass(batch) else batch[key]
        return batch

    def __str__(self) -> str:
        return "batch" + "".join(f"[{key!r}]" for key in self.path)


@dataclass(frozen=True)
class Constant:
    """An argument that is the same for every batch.

    Attributes:
        value: The argument, a number, a string, a truth value or `None`.
    """

    value: Any

    def of(self, batch: Any) -> Any:
        """The argument."""
        return self.value

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class EncoderCall:
    """How a training step calls an encoder.

    Attributes:
        positional: Positional arguments.
        named: Named arguments.
    """

    positional: tuple[Part | Constant, ...]
    named: dict[str, Part | Constant]

    @property
    def takes_batch(self) -> bool:
        """Whether the encoder is called with the batch and nothing else."""
        return self.positional == (Part(()),) and not self.named

    @property
    def has_numbers(self) -> bool:
        """Whether an argument is a number that was not found in the batch, but may depend on it."""
        places = (*self.positional, *self.named.values())
        return any(isinstance(place, Constant) and _is_number(place.value) for place in places)

    def arguments(self, batch: Any) -> tuple[list[Any], dict[str, Any]]:
        """The arguments for a batch.

        Args:
            batch: Batch of the same structure as that in which the parts were found.
        """
        named = {name: place.of(batch) for name, place in self.named.items()}
        return [place.of(batch) for place in self.positional], named

    def __str__(self) -> str:
        named = (f"{name}={place}" for name, place in self.named.items())
        return ", ".join([*map(str, self.positional), *named])


def find_call(batch: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> EncoderCall | None:
    """Find the arguments of a call in a batch.

    Args:
        batch: The batch that the caller had.
        positional: Positional arguments of the call.
        named: Named arguments of the call.

    Returns:
        The call in terms of the batch; `None` if an argument is neither a part of it nor a constant, or is a
        number that several parts are equal to. A number or string that one part is equal to is this part,
        unless it stands in a list of such.
    """
    walked = list(_walk(batch, ()))
    places = {id(value): Part(path) for path, value in reversed(walked)}
    scalars = [(value, Part(path)) for path, value in walked if _is_number(value) or isinstance(value, str)]

    def place_of(value: Any) -> Part | Constant | None:
        if _is_number(value) or isinstance(value, str):
            equal = [part for scalar, part in scalars if type(scalar) is type(value) and scalar == value]
            if len(equal) > 1 and _is_number(value):
                return None
            return equal[0] if len(equal) == 1 else Constant(value)
        if value is None or isinstance(value, bool):
            return Constant(value)
        return places.get(id(value))

    found = [place_of(value) for value in positional]
    found_named = {name: place_of(value) for name, value in named.items()}
    if any(place is None for place in (*found, *found_named.values())):
        return None
    return EncoderCall(
        tuple(place for place in found if place is not None),
        {name: place for name, place in found_named.items() if place is not None},
    )


def describe(value: Any) -> str:
    """The structure of a batch or an argument in a few words, for messages.

    Args:
        value: What to describe.
    """
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {sorted(map(str, value))}"
    if isinstance(value, tuple | list) and len(value) <= 8:
        return f"{type(value).__name__} of {', '.join(map(describe, value)) or 'nothing'}"
    return type(value).__name__


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _walk(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """A batch and its parts with their paths, from the outside in."""
    yield path, value
    if len(path) == _DEPTH:
        return
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, list | tuple):
        # What is equal to one of many captions or clip ids need not come from there.
        if all(item is None or isinstance(item, bool | int | float | str) for item in value):
            return
        inner = list(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        inner = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        return
    for key, part in inner:
        yield from _walk(part, (*path, key))
