"""Whether a knowledge source is the one that a base was made of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import Subset

from ask_lightning.encoding.source_loader import num_items


def dataset_of(loader: object) -> object:
    """The dataset of a loader, without selections of its rows; the loader itself if it has none.

    Args:
        loader: The loader that a refresh reads.
    """
    return _whole(getattr(loader, "dataset", loader))


def given_dataset_of(loader: object) -> object:
    """The same of the dataset that a loader was made for, of which it may read a variant without crops.

    Args:
        loader: The loader that a refresh reads.
    """
    return _whole(loader.given_dataset) if hasattr(loader, "given_dataset") else dataset_of(loader)


def _whole(dataset: object) -> object:
    """A dataset without selections of its rows."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def weak_reference(dataset: object) -> Callable[[], object] | None:
    """A reference that does not keep a dataset alive; `None` for lists and the like.

    Args:
        dataset: The dataset to refer to.
    """
    try:
        return weakref.ref(dataset)
    except TypeError:
        return None


def source_key(loader: object) -> dict[str, Any]:
    """What tells sources apart without reading them.

    Args:
        loader: The loader that a refresh reads.

    Returns:
        The class of the dataset, the number of its items, and a checksum of the rows that `Subset`s select;
        `None` where all are read.
    """
    kind = type(dataset_of(loader))
    return {
        "dataset": f"{kind.__module__}.{kind.__qualname__}",
        "items": num_items(loader),
        "selection": _selection(getattr(loader, "dataset", loader)),
    }


def _selection(dataset: object) -> str | None:
    """A checksum of the rows that `Subset`s select, such as one fold of several that are equally long."""
    digest = None
    while isinstance(dataset, Subset):
        digest = digest or blake2b(digest_size=8)
        digest.update(np.asarray(dataset.indices, dtype=np.int64).tobytes() + b";")
        dataset = dataset.dataset
    return None if digest is None else digest.hexdigest()
