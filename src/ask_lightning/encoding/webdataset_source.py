"""Pipelines of WebDataset as a knowledge source: every sample once, in the order of the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import copy
from importlib import import_module
from typing import Any

from torch.utils.data import DataLoader

_SPLITTERS = ("split_by_node", "split_by_worker")


def is_pipeline(dataset: object) -> bool:
    """Whether a dataset or loader is a pipeline of webdataset, told without importing it.

    Args:
        dataset: Any object.
    """
    return any(
        kind.__name__ == "DataPipeline" and kind.__module__.split(".")[0] == "webdataset"
        for kind in type(dataset).__mro__
    )


def in_order(pipeline: Any) -> Any:
    """A copy of a pipeline that yields every sample once, in the order of the shards.

    Shuffles are left out, shards that are drawn with replacement are read one after the other, `with_epoch`
    and `repeat` are taken back, and batches may be smaller at the end. The pipeline itself stays as it is,
    with the epoch that its shuffles count.

    Args:
        pipeline: Pipeline of webdataset.

    Returns:
        The copy.

    Raises:
        ValueError: Shards are divided among the processes, or among the workers, twice.
    """
    counts = Counter(getattr(stage, "__name__", "") for stage in _stages(pipeline))
    for name in _SPLITTERS:
        if counts[name] > 1:
            raise ValueError(
                f"The WebDataset of the knowledge applies `{name}` {counts[name]} times, so some "
                "shards are read by nobody. WebDataset has it as an argument: leave the other out."
            )
    result = copy(pipeline)
    result.repetitions, result.nsamples = 1, -1
    result.pipeline = [stage for each in pipeline.pipeline if (stage := _stage_in_order(each)) is not None]
    return result


def makes_batches(pipeline: Any) -> bool:
    """Whether what a pipeline yields are batches.

    Args:
        pipeline: Pipeline of webdataset.
    """
    first = pipeline.pipeline[0]
    is_batch = first.batch_size is not None if isinstance(first, DataLoader) else False
    for stage in _stages(pipeline):
        if (name := _name(stage)) in ("_batched", "_unbatched"):
            is_batch = name == "_batched"
    return is_batch


def has_epoch_of_its_own(loader: object) -> bool:
    """Whether a pipeline, or one that a loader reads, has an epoch that was set by `with_epoch` or `repeat`.

    Args:
        loader: Any loader or dataset.
    """
    if is_pipeline(loader):
        stages: list[Any] = loader.pipeline  # type: ignore[attr-defined]
        return loader.repetitions != 1 or any(map(has_epoch_of_its_own, stages))  # type: ignore[attr-defined]
    return isinstance(loader, DataLoader) and has_epoch_of_its_own(loader.dataset)


class StagedLoader:
    """The batches that a `WebLoader` makes of those of its loader.

    Args:
        loader: New loader for the first stage.
        pipeline: Pipeline whose later stages are applied.
    """

    def __init__(self, loader: DataLoader[Any], pipeline: Any) -> None:
        self.loader = loader
        self.pipeline = pipeline
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[Any]:
        return _StagedIterator(self.loader, self.pipeline)


class _StagedIterator:
    """Batches of one pass, whose worker processes can be ended."""

    def __init__(self, loader: DataLoader[Any], pipeline: Any) -> None:
        self._first = iter(loader)
        source: Any = self._first
        for stage in pipeline.pipeline[1:]:
            source = pipeline.invoke(stage, source)
        self._batches = iter(source)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def _shutdown_workers(self) -> None:
        shut_down = getattr(self._first, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def _stages(pipeline: Any) -> Iterator[Any]:
    """All stages, also those of pipelines in it."""
    for stage in pipeline.pipeline:
        inner = stage.dataset if isinstance(stage, DataLoader) else stage
        if is_pipeline(inner):
            yield from _stages(inner)
        else:
            yield stage


def _name(stage: Any) -> str:
    """The name of the function that a filter applies, or of its class."""
    return getattr(getattr(stage, "f", None), "__name__", type(stage).__name__)


def _stage_in_order(stage: Any) -> Any:
    """A stage that keeps the order and loses nothing; `None` for one that only shuffles."""
    name = _name(stage)
    if name in ("_shuffle", "detshuffle"):
        return None
    if name == "ResampledShards":
        return import_module("webdataset").SimpleShardList(list(stage.urls))
    if name == "SimpleShardList":
        stage = copy(stage)
        stage.seed = None
    elif name == "_batched":
        stage = copy(stage)
        stage.args, stage.kw = stage.args[:2], {**stage.kw, "partial": True}
    elif is_pipeline(stage):
        return in_order(stage)
    return stage
