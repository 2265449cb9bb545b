"""Cutting what an encoder takes into rows: mappings, lists, dataclasses of tensors and lists."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

_SCALARS = (str, bytes, int, float, complex, bool, type(None))


def num_rows(parts: Mapping[str, Any], caller: str) -> int:
    """The number of rows that all parts of a batch have.

    Rows are the first dimension of tensors and arrays, and the items of lists of strings and numbers. A list
    of something else holds parts of the batch, one behind the other, if they all have equally many rows or
    are of different kinds; otherwise its items are the rows. Numbers, strings, None and tensors without a
    dimension have no rows: they belong to all of them.

    Args:
        parts: What is to be cut, by names for the message.
        caller: Encoder that takes it, for the message.

    Returns:
        The number of rows.

    Raises:
        ValueError: Parts have different numbers of rows, or none has any.
        TypeError: A part is of a kind that cannot be cut.

    Examples:
        >>> import torch
        >>> num_rows({"batch": {"audio": torch.ones(3, 8), "text": ["a", "b", "c"], "rate": 16000}}, "encode")
        3
    """
    counts = {path: count for name, part in parts.items() for path, count, _ in _counted(part, name, caller)}
    firm = {
        count for name, part in parts.items() for _, count, is_firm in _counted(part, name, caller) if is_firm
    }
    found = firm or set(counts.values())
    if len(found) == 1 and (rows := found.pop()) > 0:
        for name, part in parts.items():
            _cut(part, 0, 0, rows, name, counts, caller)
        return rows
    raise _ragged(counts, caller)


def rows_of(part: Any, start: int, stop: int, rows: int) -> Any:
    """Some rows of a part of a batch; tensors are views.

    Args:
        part: What `num_rows` has looked at.
        start: First row.
        stop: Row behind the last one.
        rows: What `num_rows` has returned.

    Returns:
        A structure of the same kind with these rows.

    Examples:
        >>> rows_of({"text": ["a", "b", "c"], "rate": 16000}, 1, 3, 3)
        {'text': ['b', 'c'], 'rate': 16000}
    """
    return _cut(part, start, stop, rows, "", {}, "")


def tensors_of(part: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a part of a batch, with their places.

    Args:
        part: What `num_rows` takes, or a mapping of such.
        path: Name of the part, for messages.
    """
    if isinstance(part, Tensor):
        yield path, part
    elif isinstance(part, list) or type(part) is tuple:
        for i, item in enumerate(part):
            yield from tensors_of(item, f"{path}[{i}]")
    elif not _is_shared(part):
        for key, item in _items(part, path, "").items():
            yield from tensors_of(item, _place(part, path, key) if path else str(key))


def _counted(value: Any, path: str, caller: str) -> Iterator[tuple[str, int, bool]]:
    """Path and number of rows of each part, and whether they are its rows for certain."""
    if _has_rows(value):
        yield path, len(value), True
    elif _is_shared(value):
        return
    elif isinstance(value, list) or type(value) is tuple:
        inner = [part for i, item in enumerate(value) for part in _counted(item, f"{path}[{i}]", caller)]
        if len({count for _, count, _ in inner}) == 1 or not _are_alike(value):
            yield from ((place, count, False) for place, count, _ in inner)
        else:
            yield path, len(value), False
    else:
        for key, item in _items(value, path, caller).items():
            yield from _counted(item, _place(value, path, key), caller)


def _cut(
    value: Any, start: int, stop: int, rows: int, path: str, counts: Mapping[str, int], caller: str
) -> Any:
    """The rows from `start` to `stop` of something that has `rows`."""
    if _has_rows(value):
        if len(value) != rows:
            raise _ragged({**counts, path: len(value)}, caller)
        return value[start:stop]
    if _is_shared(value):
        return value
    if isinstance(value, list) or type(value) is tuple:
        inner = {count for i, item in enumerate(value) for _, count, _ in _counted(item, str(i), caller)}
        if inner == {rows} or not _are_alike(value):
            return type(value)(
                _cut(item, start, stop, rows, f"{path}[{i}]", counts, caller) for i, item in enumerate(value)
            )
        if len(value) != rows:
            raise _ragged({**counts, path: len(value)}, caller)
        return value[start:stop]
    cut = {
        key: _cut(item, start, stop, rows, _place(value, path, key), counts, caller)
        for key, item in _items(value, path, caller).items()
    }
    if isinstance(value, MutableMapping):
        shallow = copy.copy(value)  # of its class, with what else it holds
        for key, item in cut.items():
            shallow[key] = item
        return shallow
    if isinstance(value, Mapping):
        return cut
    return type(value)(**cut) if isinstance(value, tuple) else replace(value, **cut)


def _has_rows(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    if not (isinstance(value, list) or type(value) is tuple):
        return False
    return len(value) > 0 and all(isinstance(item, _SCALARS) for item in value)


def _are_alike(items: Sequence[Any]) -> bool:
    """Whether the items of a list may be its rows."""
    kinds = {(type(item), item.ndim if isinstance(item, Tensor | np.ndarray) else 0) for item in items}
    return len(kinds) == 1


def _is_shared(value: Any) -> bool:
    """Whether something without rows belongs to all of them."""
    return isinstance(value, (*_SCALARS, Tensor, np.ndarray, np.generic))


def _items(value: Any, path: str, caller: str) -> dict[Any, Any]:
    """The parts of a mapping, dataclass or named tuple."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    raise TypeError(
        f"`chunk_size` cuts what `{caller}` takes into rows, but {path} is a {type(value).__name__}. Let the "
        "batch be made of tensors, lists of strings, mappings, tuples and dataclasses, or leave `chunk_size` "
        "out."
    )


def _place(value: Any, path: str, key: Any) -> str:
    return f"{path}[{key!r}]" if isinstance(value, Mapping) else f"{path}.{key}"


def _ragged(counts: Mapping[str, int], caller: str) -> ValueError:
    """The error for parts with different numbers of rows, or without rows."""
    found = ", ".join(f"{path} has {count}" for path, count in counts.items()) or "no part has any"
    return ValueError(
        f"`chunk_size` cuts what `{caller}` takes along the first dimension, so all parts need one row for "
        f"each pair, but {found}. Give every part a row for each pair (what belongs to all of them may be a "
        "number or a tensor without a dimension), or leave `chunk_size` out."
    )
