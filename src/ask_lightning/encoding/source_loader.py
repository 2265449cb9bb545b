"""The loader that a refresh reads: this rank's items of the knowledge source, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard
from warnings import warn

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ask_lightning.encoding.litdata_source import from_the_start, is_streaming_dataset
from ask_lightning.encoding.webdataset_source import StagedLoader, in_order, is_pipeline
from ask_lightning.encoding.webdataset_source import makes_batches as pipeline_makes_batches
from ask_lightning.utilities.augmentation import without_augmentation
from ask_lightning.utilities.distributed import Ranks

Source = Dataset[Any] | DataLoader[Any] | Iterable[Any]

# Samplers that visit the whole dataset in some order or weight; any other may stand for a selection.
_SAMPLERS_OF_ALL_ROWS = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


def source_loader(
    source: object,
    training: object,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    ranks: Ranks | None = None,
    max_items: int | None = None,
) -> Iterable[Any]:
    """Make a loader over this rank's items of the knowledge source, in order: no drops, padding or crops.

    The items of a map-style dataset are divided among the ranks; an iterable source has to yield each rank
    its own items.

    Args:
        source: `None` for the data of `training`, or a `Dataset`, a `DataLoader`, another re-iterable of
            batches, or a callable that returns one of them.
        training: The trainer's own training loader, from which collation, batch size and workers are taken
            unless the source is a loader itself.
        batch_size: Number of pairs per batch; default: that of the loader.
        num_workers: Number of worker processes; default: that of the loader.
        ranks: The processes among which the source is divided; default: this one alone.
        max_items: Number of items of a map-style dataset, counted over all ranks, that are read at most.

    Returns:
        A new loader. Loaders that are passed in are not iterated.

    Raises:
        TypeError: The source is none of these, an iterator that can be read only once, or a training loader
            that makes batches in a way of its own.
        ValueError: A batch size is needed and not given, or given where the dataset makes the batches.
    """
    given = source() if callable(source) and not isinstance(source, Dataset) else source
    given = training if given is None else given
    template, is_training = _loader_of(training), given is training
    if is_pipeline(given):
        pipeline: Any = in_order(given)
        given, first = pipeline, pipeline.pipeline[0]
        if isinstance(first, DataLoader):
            loader = source_loader(
                first, first, batch_size=batch_size, num_workers=num_workers, ranks=ranks, max_items=max_items
            )
            assert isinstance(loader, DataLoader)
            return StagedLoader(loader, pipeline)
    if is_training and isinstance(given, IterableDataset):
        return given  # without a loader around it: Lightning takes what it yields as batches
    if isinstance(given, DataLoader) and _makes_own_batches(given):
        if is_training or batch_size is not None or num_workers is not None:
            raise TypeError(
                f"{type(given).__name__} makes its batches by an `__iter__` of its own, which a loader of "
                "another order, batch size or number of workers would not do. Pass such a loader for the "
                "knowledge, in order and without augmentation: KnowledgeRefreshCallback(source=loader)."
            )
        return given
    if isinstance(given, DataLoader):
        template, dataset = given, _selected_rows(given)
    elif isinstance(given, Dataset):
        dataset = given
    elif _is_iterable_of_batches(given):
        return given
    else:
        raise TypeError(
            "Argument `source` has to be a Dataset, a DataLoader, a callable that returns one, or None for a "
            f"training set that is one, but got {type(given).__name__}. "
            "Pass KnowledgeRefreshCallback(source=dataset)."
        )
    given_dataset, dataset = dataset, without_augmentation(dataset)
    # A loader without a batch sampler passes on what its dataset yields, which are batches already.
    makes_batches = template is given and template is not None and template.batch_sampler is None
    if is_pipeline(dataset):
        dataset = in_order(dataset)
        makes_batches = makes_batches or pipeline_makes_batches(dataset)
    size = _items_per_batch(batch_size, template, dataset_makes_batches=makes_batches)
    workers = num_workers
    if workers is None:
        workers = 0 if template is None else template.num_workers
    if is_streaming_dataset(dataset):
        dataset = from_the_start(dataset, size, workers)
    elif is_training and template is not None and template.num_workers == 0:
        _warn_of_place(dataset)
    settings = {} if template is None else _shared_settings(template, workers, is_source=template is given)
    if size is None and template is not given:
        settings.pop("collate_fn", None)  # which makes batches of items
    made = DataLoader(
        dataset,
        batch_size=size,
        # Not a Subset, because workers may look for their settings in the dataset itself.
        sampler=_own_items(dataset, size, ranks or Ranks(), max_items),
        drop_last=False,
        num_workers=workers,
        # Iterating a loader draws a seed for its workers, which must not come from the run's stream.
        generator=torch.Generator(),
        **settings,
    )
    # What a dataset is without augmentation may be another object for each loader, see `source_identity`.
    made.given_dataset = given_dataset
    return made


def _warn_of_place(dataset: Dataset[Any]) -> None:
    """Warn of a stream whose place is moved by training in this process, and may not be its start now."""
    keeps_place = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    # Those of the Hugging Face library begin anew at each iteration.
    if isinstance(dataset, IterableDataset) and keeps_place and type(dataset).__module__[:8] != "datasets":
        warn(
            f"{type(dataset).__name__} keeps its place in the stream (`state_dict`), so a refresh that reads "
            "it beside training may begin in the middle. Pass a function that makes it anew: "
            "KnowledgeRefreshCallback(source=function).",
            stacklevel=3,
        )


def _items_per_batch(
    batch_size: int | None, template: DataLoader[Any] | None, *, dataset_makes_batches: bool
) -> int | None:
    """The batch size of the new loader; `None` if the items of the dataset are batches already."""
    if dataset_makes_batches:
        if batch_size is not None:
            raise ValueError(
                f"Argument `batch_size` has to be left out, but got {batch_size}: the source's loader has "
                "`batch_size=None`, so its dataset makes the batches."
            )
        return None
    size = batch_size or batch_size_of(template)
    if size is None:
        raise ValueError(
            "The source's items need a batch size, and its loader has none of its own: pass a DataLoader as "
            "source, or KnowledgeRefreshCallback(batch_size=...)."
        )
    return size


def _shared_settings(template: DataLoader[Any], num_workers: int, *, is_source: bool) -> dict[str, Any]:
    """Settings of a loader that the new one takes over.

    Args:
        template: The loader of the source or of the training data.
        num_workers: Number of worker processes of the new loader.
        is_source: Whether `template` is the loader of the source.
    """
    names = ["pin_memory", "worker_init_fn"]
    # Without a batch sampler, the training loader's collation is one of whole batches.
    if is_source or template.batch_sampler is not None:
        names.append("collate_fn")
    if num_workers > 0 and template.num_workers > 0:
        names += ["timeout", "multiprocessing_context", "prefetch_factor"]
    return {name: getattr(template, name) for name in names}


def _own_items(
    dataset: Dataset[Any], batch_size: int | None, ranks: Ranks, max_items: int | None
) -> range | None:
    """Numbers of the items that this rank reads; `None` if it reads all that the dataset yields."""
    if isinstance(dataset, IterableDataset) or (ranks.size == 1 and max_items is None):
        return None
    items = len(dataset)  # type: ignore[arg-type]
    if batch_size is None:  # each item is a batch of any size: only contiguous shares keep the order of rows
        return range(items * ranks.rank // ranks.size, items * (ranks.rank + 1) // ranks.size)
    return range(ranks.rank, items if max_items is None else min(items, max_items), ranks.size)


def _makes_own_batches(loader: DataLoader[Any]) -> bool:
    """Whether a subclass of `DataLoader` iterates in a way of its own."""
    if is_streaming_dataset(loader.dataset):
        return False  # litdata's loader does no more than count
    iterates = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    # torchdata's StatefulDataLoader and the loader of this library's data modules iterate like torch's.
    return iterates.__module__.split(".")[0] not in ("torch", "torchdata", "ask_lightning")


def _loader_of(training: object) -> DataLoader[Any] | None:
    """The loader whose settings a source without one of its own takes over."""
    if is_pipeline(training):  # a WebLoader has its loader as the first stage
        training = training.pipeline[0]  # type: ignore[attr-defined]
    return training if isinstance(training, DataLoader) else None


def _is_iterable_of_batches(given: object) -> TypeGuard[Iterable[Any]]:
    """Whether an object yields batches and can be iterated again and again."""
    if not isinstance(given, Iterable) or isinstance(given, str | dict) or iter(given) is given:
        return False
    return not (isinstance(given, list | tuple) and any(isinstance(item, DataLoader) for item in given))


def batch_size_of(loader: object) -> int | None:
    """The number of items per batch of a loader or its batch sampler, if it has one."""
    if not isinstance(loader, DataLoader):
        return None
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def _selected_rows(loader: DataLoader[Any]) -> Dataset[Any]:
    """The part of a loader's dataset that its sampler may visit, in the dataset's order."""
    dataset: Dataset[Any] = loader.dataset
    if isinstance(dataset, IterableDataset):
        return dataset
    batches: Any = loader.batch_sampler
    # A loader with a user's batch sampler has a `sampler` as well, which is never used.
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", batches)
    if isinstance(sampler, DistributedSamplerWrapper):  # Lightning's wrapper of a user's sampler
        sampler = getattr(sampler.dataset, "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        # The usual way to split one dataset: the rows left out are validation rows.
        return Subset(dataset, sorted(sampler.indices))
    size = len(dataset)  # type: ignore[arg-type]
    rows_per_draw = (batch_size_of(loader) or 0) if sampler is batches else 1
    if isinstance(sampler, _SAMPLERS_OF_ALL_ROWS) or not hasattr(sampler, "__len__") or not rows_per_draw:
        return dataset
    # With `drop_last` less than one batch is missing, which is no selection.
    if (visited := len(sampler) * rows_per_draw) <= size - rows_per_draw:
        warn(
            f"{type(sampler).__name__} visits {visited} rows an epoch, but the knowledge is made of all "
            f"{size} rows of the dataset. If some of them must not be seen, pass "
            "KnowledgeRefreshCallback(source=dataset) with the others.",
            stacklevel=3,
        )
    return dataset


def has_index(loader: object) -> bool:
    """Whether a loader reads its items by number, so that row j is the same pair at every refresh."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and not _makes_own_batches(loader)
    )


def num_items(loader: object) -> int | None:
    """The number of items of a loader's dataset on all ranks; `None` without an index."""
    return len(loader.dataset) if has_index(loader) else None  # type: ignore[attr-defined]


def items_per_batch(loader: Iterable[Any]) -> list[int]:
    """The number of items of each batch of a loader that `source_loader` made; empty if it is not known."""
    if not isinstance(loader, DataLoader) or not has_index(loader) or loader.batch_size is None:
        return []
    items = len(loader.sampler)  # type: ignore[arg-type]
    return [min(loader.batch_size, items - start) for start in range(0, items, loader.batch_size)]


@contextmanager
def open_batches(loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Iterate a loader whose worker processes end with the context, also after an error."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        # The traceback of an error would keep the workers alive.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
