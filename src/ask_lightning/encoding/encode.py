"""From the knowledge source to embeddings, without a trace in the training run.

Reading the source must not draw from the run's random streams, must not un-freeze a submodule, and must
see every row once, in order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeGuard
from warnings import warn

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
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

from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.row_shard import Part
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks

Source = Dataset[Any] | DataLoader[Any] | Iterable[Any]
Embed = Callable[[Any], tuple[Tensor, Tensor, Any]]

_EMPTY = "The knowledge source is empty: it yielded no batch. Check `source`."

# Samplers that visit the whole dataset in some order or weight; any other may stand for a selection.
_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


def source_loader(
    source: object,
    training: object,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    ranks: Ranks | None = None,
) -> Iterable[Any]:
    """A loader over this rank's part of the knowledge source: in order, nothing dropped, nothing padded.

    Items with an index are dealt out to the ranks; an iterable source has to yield each rank its own part.

    Args:
        source: `None` for the data of `training`, or a `Dataset`, a `DataLoader`, another re-iterable of
            batches, or a callable that returns one of them.
        training: The trainer's own training loader, whose collation, batch size and workers are the
            default.
        batch_size: Pairs per batch; default that of the loader.
        num_workers: Worker processes; default that of the loader.
        ranks: The processes that share the source; default this one.

    Returns:
        A loader of its own; given loaders are not iterated.

    Raises:
        TypeError: The source is none of these, or an iterator that can be read once only.
        ValueError: A batch size is needed and not given, or given and not needed.
    """
    given = source() if callable(source) and not isinstance(source, Dataset) else source
    given = training if given is None else given
    like = training if isinstance(training, DataLoader) else None
    if isinstance(given, DataLoader):
        like, dataset = given, _selected(given)
    elif isinstance(given, Dataset):
        dataset = given
    elif _is_batches(given):
        return given
    else:
        raise TypeError(
            "Argument `source` has to be a Dataset, a DataLoader, a callable that returns one, or None for a "
            f"training set that is one, but got {type(given).__name__}. "
            "Pass KnowledgeRefreshCallback(source=dataset)."
        )
    # A loader without a batch sampler passes on what its dataset yields, which are batches already.
    batches_itself = like is not None and like.batch_sampler is not None
    if like is given and not batches_itself:
        if batch_size is not None:
            raise ValueError(
                f"Argument `batch_size` has to be left out, but got {batch_size}: the source's loader has "
                "`batch_size=None`, so its dataset makes the batches."
            )
        size = None
    else:
        size = batch_size or _batch_size(like)
        if size is None:
            raise ValueError(
                "Argument `batch_size` of KnowledgeRefreshCallback has to be given, because the source's "
                "loader has none of its own."
            )
    workers = num_workers if num_workers is not None else (like.num_workers if like is not None else 0)
    settings: dict[str, Any] = {}
    if like is not None:
        shared = ["pin_memory", "worker_init_fn"]
        if batches_itself or like is given:
            shared.append("collate_fn")
        if workers > 0 and like.num_workers > 0:
            shared += ["timeout", "multiprocessing_context", "prefetch_factor"]
        settings = {name: getattr(like, name) for name in shared}
    return DataLoader(
        dataset,
        batch_size=size,
        # Not a Subset, because workers may look for what is theirs in the dataset itself.
        sampler=_share(dataset, size, ranks or Ranks()),
        drop_last=False,
        num_workers=workers,
        # Iterating a loader draws a seed for its workers; not from the run's stream.
        generator=torch.Generator(),
        **settings,
    )


def _share(dataset: Dataset[Any], batch_size: int | None, ranks: Ranks) -> range | None:
    """Which items this rank reads; all in order where there is one, or no index."""
    if ranks.size == 1 or isinstance(dataset, IterableDataset):
        return None
    items = len(dataset)  # type: ignore[arg-type]
    if batch_size is None:  # batches of any size: ranks that follow each other keep the order of rows
        return range(items * ranks.rank // ranks.size, items * (ranks.rank + 1) // ranks.size)
    return range(ranks.rank, items, ranks.size)


def _is_batches(given: object) -> TypeGuard[Iterable[Any]]:
    """Whether something can be read again and again and yields batches."""
    if not isinstance(given, Iterable) or isinstance(given, str | dict) or iter(given) is given:
        return False
    return not (isinstance(given, list | tuple) and any(isinstance(item, DataLoader) for item in given))


def _batch_size(loader: DataLoader[Any] | None) -> int | None:
    if loader is None:
        return None
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def _selected(loader: DataLoader[Any]) -> Dataset[Any]:
    """The rows that a loader may visit, in the dataset's order."""
    dataset: Dataset[Any] = loader.dataset
    if isinstance(dataset, IterableDataset):
        return dataset
    batches: Any = loader.batch_sampler
    # Beside a batch sampler that the user made, `loader.sampler` is one that nobody draws from.
    sampler: Any = loader.sampler if batches is None else getattr(batches, "sampler", batches)
    if isinstance(sampler, DistributedSamplerWrapper):  # Lightning's, around the one that the user made
        sampler = getattr(sampler.dataset, "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        # The usual way to split one dataset: the rows left out are validation rows.
        return Subset(dataset, sorted(sampler.indices))
    size = len(dataset)  # type: ignore[arg-type]
    rows_a_draw = (_batch_size(loader) or 0) if sampler is batches else 1
    if isinstance(sampler, _WHOLE) or not hasattr(sampler, "__len__") or not rows_a_draw:
        return dataset
    # Less than a batch may be missing where the last one is dropped.
    if (visited := len(sampler) * rows_a_draw) <= size - rows_a_draw:
        warn(
            f"{type(sampler).__name__} visits {visited} rows an epoch, but the knowledge is made of all "
            f"{size} rows of the dataset. If some of them must not be seen, pass "
            "KnowledgeRefreshCallback(source=dataset) with the others.",
            stacklevel=3,
        )
    return dataset


class Encoded(NamedTuple):
    """What this rank encoded of a source.

    Attributes:
        audio: `(n, d)` float32, on the module's device.
        text: `(n, d)` float32.
        ids: `(n,)` int64, or `None`.
        part: Which rows of the source these are.
    """

    audio: Tensor
    text: Tensor
    ids: Tensor | None
    part: Part


def encode_source(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Iterable[Any],
    embed: Embed,
    advance: Callable[[], object] = lambda: None,
    *,
    ranks: Ranks | None = None,
) -> Encoded:
    """Embeddings of every pair of a source, by the current encoders in evaluation mode.

    Batches take the way that the trainer's own take: the precision plugin, the batch transfer hooks (in a
    validation stage, so that hooks which augment while training do not), the device.

    Args:
        trainer: The running trainer.
        module: The module that is trained.
        loader: Batches of this rank's part of the source, in order.
        embed: Batch → audio, text, ids.
        advance: Called after each batch, for a progress bar.
        ranks: The processes that share the source, as for `source_loader`; then this is collective.

    Returns:
        This rank's embeddings, and which rows of the source they are.

    Raises:
        ValueError: The source yields no batch, or embeddings are not two equal `(B, d)`.
        RuntimeError: Another rank failed, or ranks that should bring parts of their own brought the same.
    """
    ranks = ranks or Ranks()
    if ranks.size > 1:
        weights = sum(checksum(weight) for weight in module.parameters()) % 2**64
        ranks.require_equal(
            (f"weights {weights:016x}", _num_rows(loader)),
            "the weights and the length of the knowledge source",
        )
    audio: list[Tensor] = []
    text: list[Tensor] = []
    ids: list[Tensor] = []
    with ranks.all_or_none("encoding its part of the knowledge source"):
        with _without_a_trace(trainer, module), torch.no_grad(), _batches(loader) as batches:
            for batch in batches:
                moved = trainer.precision_plugin.convert_input(batch)
                moved = module._on_before_batch_transfer(moved, dataloader_idx=0)
                moved = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
                with trainer.precision_plugin.forward_context():
                    batch_audio, batch_text, batch_ids = embed(moved)
                _check_batch(batch_audio, batch_text, batch_ids)
                audio.append(batch_audio.detach().float())  # (B, d)
                text.append(batch_text.detach().float())  # (B, d)
                if batch_ids is not None:
                    ids.append(integer_ids(batch_ids).cpu())
                advance()
        if not audio and ranks.size == 1:
            raise ValueError(_EMPTY)
    return _as_part(audio, text, ids, loader, module.device, ranks)


def _as_part(
    audio: list[Tensor],
    text: list[Tensor],
    ids: list[Tensor],
    loader: Iterable[Any],
    device: torch.device,
    ranks: Ranks,
) -> Encoded:
    """The batches that a rank encoded, perhaps none, with their place in the whole."""
    rows, items = [len(batch) for batch in audio], _items_of_batches(loader)
    own_ids = torch.cat(ids) if ids else None
    width = audio[0].shape[1] if audio else None
    at_a_time = _rows_an_item(rows, items, own_ids) if items else None
    words = ranks.all_gather_object((sum(rows), width, own_ids is not None, sum(items), at_a_time))
    counts = [word[0] for word in words]
    if not any(counts):
        raise ValueError(_EMPTY)
    if audio:
        own_audio, own_text = torch.cat(audio), torch.cat(text)
    else:  # fewer rows than ranks
        width = next(width for count, width, *_ in words if count)
        own_audio, own_text = torch.empty(2, 0, width, device=device)
        own_ids = torch.empty(0, dtype=torch.int64) if any(word[2] for word in words) else None
    told = {word[4] for word in words} - {None}
    if len(told) == 1 and (same := told.pop()):
        part = Part.dealt(sum(word[3] for word in words), ranks, same)
    else:
        part = Part.brought(counts, ranks)
    if ranks.size > 1 and not has_index(loader):
        _check_own_parts(own_audio, own_text, own_ids, ranks)
    return Encoded(own_audio, own_text, own_ids, part)


def _items_of_batches(loader: Iterable[Any]) -> list[int]:
    """How many items, dealt out in turn, each batch is made of; none where ranks follow each other."""
    if not isinstance(loader, DataLoader) or not has_index(loader) or loader.batch_size is None:
        return []
    items = len(loader.sampler)  # type: ignore[arg-type]
    return [min(loader.batch_size, items - start) for start in range(0, items, loader.batch_size)]


def _rows_an_item(rows: list[int], items: list[int], ids: Tensor | None) -> int:
    """How many rows collation makes of every item, such as one for each caption; 0 where that varies."""
    each = sum(rows) // sum(items)
    if not each or rows != [each * count for count in items]:
        return 0
    # Three rows of one item and one of the next are two each on average.
    if ids is not None and bool((ids.view(-1, each) != ids[::each, None]).any()):
        return 0
    return each


def has_index(loader: object) -> bool:
    """Whether a loader reads items by number, so that row j is the same pair at every refresh."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _num_rows(loader: object) -> int | None:
    return len(loader.dataset) if has_index(loader) else None  # type: ignore[attr-defined]


def _check_own_parts(audio: Tensor, text: Tensor, ids: Tensor | None, ranks: Ranks) -> None:
    """Refuse an iterable source that yields every rank the same."""
    sides = (audio, text) if ids is None else (audio, text, ids)
    # Rows that are all alike, as a head that starts from zeros makes them, tell nothing.
    varied = len(audio) > 0 and all(bool((side.amin(0) < side.amax(0)).any()) for side in (audio, text))
    words = ranks.all_gather_object((len(audio), *map(checksum, sides)) if varied else None)
    for rank, word in enumerate(words):
        first = words.index(word)
        if word is not None and first < rank:
            raise RuntimeError(
                f"Ranks {first} and {rank} read the same {word[0]} pairs of the knowledge source. A source "
                "without an index has to yield each rank its own part: take every "
                "`torch.distributed.get_world_size()`-th item from `torch.distributed.get_rank()` on in its "
                "`__iter__`, or pass a map-style Dataset, which is divided for you."
            )


@contextmanager
def _batches(loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """A loader's iterator whose workers end with the context, also after an error."""
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        # The traceback of an error would keep them alive.
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def _check_batch(audio: Tensor, text: Tensor, ids: Any) -> None:
    if audio.ndim != 2 or audio.shape != text.shape:
        raise ValueError(
            "The encoders have to return embeddings of the same shape (batch, width) for every batch of the "
            f"knowledge source, but returned audio {tuple(audio.shape)} and text {tuple(text.shape)}. "
            "Project both to one width, pool tokens, and do not squeeze a last batch of one."
        )
    if ids is not None and len(ids) != len(audio):
        raise ValueError(f"There have to be {len(audio)} clip ids in this batch, but got {len(ids)}.")


@contextmanager
def _without_a_trace(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(random_streams_kept())
        stack.enter_context(_buffers_of_first_rank(module))
        stack.enter_context(_evaluation(module))
        stack.enter_context(_logging_muted(module))
        stack.enter_context(_validation_stage(trainer))
        yield


@contextmanager
def _buffers_of_first_rank(module: nn.Module) -> Iterator[None]:
    """One encoder on all ranks, and the one that a checkpoint holds.

    Running means of batch norm, which each rank moves by its own batches, are rank 0's again only when DDP
    starts the next training step.
    """
    ranks = Ranks.current()
    if ranks.size == 1:
        yield
        return
    buffers = list(module.buffers())
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        ranks.broadcast(buffer)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in zip(buffers, own, strict=True):
                buffer.copy_(values)


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    # `train()` afterwards would un-freeze submodules that the user had put into evaluation mode.
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _logging_muted(module: nn.Module) -> Iterator[None]:
    """Encoders that log must not log the source's batches as training batches."""
    muted = [part for part in module.modules() if isinstance(part, pl.LightningModule)]
    before = [vars(part).get("log") for part in muted]
    for part in muted:
        vars(part)["log"] = _log_nothing
    try:
        yield
    finally:
        for part, log in zip(muted, before, strict=True):
            del vars(part)["log"]
            if log is not None:
                vars(part)["log"] = log


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def _validation_stage(trainer: pl.Trainer) -> Iterator[None]:
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Leave the global random streams as they were, whatever happens meanwhile."""
    # Lightning's `isolate_rng` does not restore after an exception such as Ctrl-C.
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
