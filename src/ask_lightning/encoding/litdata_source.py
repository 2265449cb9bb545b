"""Datasets of litdata as a knowledge source: every sample once, in the order of the chunks."""

from __future__ import annotations

from copy import copy
from typing import Any


def is_streaming_dataset(dataset: object) -> bool:
    """Whether a dataset is a `litdata.StreamingDataset`, told without importing litdata.

    Args:
        dataset: Any object.
    """
    return any(
        kind.__name__ == "StreamingDataset" and kind.__module__.split(".")[0] == "litdata"
        for kind in type(dataset).__mro__
    )


def from_the_start(dataset: Any, batch_size: int | None, num_workers: int) -> Any:
    """A copy of a streaming dataset that yields every sample once, in order, from its first one on.

    The dataset is its own iterator, so that reading it itself would move the place of training in it.

    Args:
        dataset: `litdata.StreamingDataset`, at whatever place it is.
        batch_size: Number of samples in a batch of the loader that reads the copy; `None` for no batches.
        num_workers: Number of its worker processes.

    Returns:
        The copy. Its samples are divided among processes and workers by litdata.
    """
    result = copy(dataset)
    result.reset()
    result.set_shuffle(False)
    result.set_drop_last(False)
    result.set_batch_size(batch_size or 1)
    result.set_num_workers(num_workers)
    return result
