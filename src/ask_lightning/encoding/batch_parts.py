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


class BatchContent:
    """What a batch holds at one moment, to be told from what a training step makes of it later.

    Tensors are not copied: one that is replaced in the batch, or written to, counts as another one.

    Args:
        batch: The batch, as the training step gets it.
    """

    def __init__(self, batch: Any) -> None:
        self._parts = [(path, value, _version(value)) for path, value in _walk(batch, ())]

    def find_call(self, positional: Sequence[Any], named: Mapping[str, Any]) -> EncoderCall | None:
        """Find the arguments of a call in the batch.

        Args:
            positional: Positional arguments of the call.
            named: Named arguments of the call.

        Returns:
            The call in terms of the batch; `None` if an argument is neither a part of it nor a constant, or
            is a number that several parts are equal to. A number or string that one part is equal to is this
            part, unless it stands in a list of such.
        """
        places = {id(value): path for path, value, _ in reversed(self._parts)}
        scalars = [
            (value, Part(path))
            for path, value, _ in self._parts
            if _is_number(value) or isinstance(value, str)
        ]

        def place_of(value: Any) -> Part | Constant | None:
            if _is_number(value) or isinstance(value, str):
                equal = [part for scalar, part in scalars if type(scalar) is type(value) and scalar == value]
                if len(equal) > 1 and _is_number(value):
                    return None
                return equal[0] if len(equal) == 1 else Constant(value)
            if value is None or isinstance(value, bool):
                return Constant(value)
            path = places.get(id(value))
            return None if path is None or not self._has_kept(value, path) else Part(path)

        found = [place_of(value) for value in positional]
        found_named = {name: place_of(value) for name, value in named.items()}
        if any(place is None for place in (*found, *found_named.values())):
            return None
        return EncoderCall(
            tuple(place for place in found if place is not None),
            {name: place for name, place in found_named.items() if place is not None},
        )

    def is_all_of(self, positional: Sequence[Any], named: Mapping[str, Any]) -> bool:
        """Whether a call has one argument, which is the batch or a copy of it.

        A copy may lack parts of the batch, and have parts of its own.

        Args:
            positional: Positional arguments of the call.
            named: Named arguments of the call.
        """
        values = [*positional, *named.values()]
        return len(values) == 1 and self._has_kept(values[0], ())

    def _has_kept(self, value: Any, path: tuple[Any, ...]) -> bool:
        """Whether a value is what the batch had in this place, or a copy of it with the same parts."""
        before = {path: (part, version) for path, part, version in self._parts}
        num_kept = 0
        for place, part in _walk(value, path):
            if place not in before:
                continue
            old, version = before[place]
            is_copy = (
                len(place) < _DEPTH and _is_container(part) and _is_container(old) and _are_alike(part, old)
            )
            if part is not old and not is_copy and not _are_equal(part, old):
                return False
            if _version(part) != version:
                return False
            num_kept += not is_copy or part is old
        return num_kept > 0


def entry_of(batch: Any, place: str | int, rule: str) -> Any:
    """The entry of a batch in a place.

    Args:
        batch: The batch.
        place: Its key, or its position in a batch that is a sequence.
        rule: What the place has to be, the first half of the error's sentence.

    Raises:
        ValueError: The batch has no such entry.

    Examples:
        >>> entry_of({"clip_id": [3]}, "clip_id", "Argument `ids` has to be a key of the batch")
        [3]
    """
    try:
        return batch[place]
    except (KeyError, TypeError, IndexError) as error:
        keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"a {describe(batch)}"
        raise ValueError(f"{rule}, but got {place!r} and the batch is {keys}.") from error


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


def _version(value: object) -> int:
    """How often a tensor has been written to; 0 for everything else, and where that is not counted."""
    return 0 if not isinstance(value, Tensor) or value.is_inference() else value._version


def _walk(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """A batch and its parts with their paths, from the outside in."""
    yield path, value
    if len(path) < _DEPTH and _is_container(value):
        for key, part in _items(value):
            yield from _walk(part, (*path, key))


def _is_container(value: Any) -> bool:
    """Whether a value has parts that are looked at one by one."""
    if isinstance(value, list | tuple):
        # What is equal to one of many captions or clip ids need not come from there.
        return not all(item is None or isinstance(item, bool | int | float | str) for item in value)
    return isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type))


def _items(container: Any) -> list[tuple[Any, Any]]:
    """The parts of a container with their keys, indices or field names."""
    if isinstance(container, Mapping):
        return list(container.items())
    if isinstance(container, list | tuple):
        return list(enumerate(container))
    return [(field.name, getattr(container, field.name)) for field in fields(container)]


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two containers are of one kind."""
    return type(one) is type(other) or (isinstance(one, Mapping) and isinstance(other, Mapping))


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal numbers, strings or lists of such."""
    plain = (int, float, str, list, tuple)
    return (
        isinstance(one, plain) and type(one) is type(other) and not _is_container(one) and bool(one == other)
    )
