"""Isolation of a refresh from training: all state that it changes is restored, also after an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ask_lightning.encoding.run_state import BufferState, RandomSource, RandomState, restorer
from ask_lightning.utilities.distributed import Ranks

# Owner, name and value of what a refresh changes in a module for as long as it takes.
_Values: TypeAlias = list[tuple[nn.Module, str, Tensor]]
_of_training: WeakKeyDictionary[nn.Module, _Values] = WeakKeyDictionary()
# Longer lists and mappings of a dataset hold its items.
_ITEMS_SEARCHED = 64


@contextmanager
def isolated_from_training(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Put the module into evaluation mode without side effects on the training run; collective.

    Random streams, training modes and buffers are restored, logging is muted, and the trainer is in its
    validation stage meanwhile.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
    """
    with ExitStack() as stack:
        values = _of_training[module] = []
        stack.callback(_of_training.pop, module)
        stack.enter_context(preserved_random_state())
        stack.enter_context(_buffers_of_rank_zero(module, values))
        stack.enter_context(_evaluation_mode(module, values))
        stack.enter_context(muted_logging(module))
        stack.enter_context(_validation_stage(trainer))
        yield


def restore_in_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put weights and buffers as training has them into a checkpoint that is written during a refresh.

    A cluster's signal can ask for one at any moment. Values that are not those of the module now, such as
    averages of weights, are left alone.

    Args:
        module: The module that is trained.
        checkpoint: The checkpoint.
    """
    values = {(id(part), name): value for part, name, value in _of_training.get(module, ())}
    if not values:
        return
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, present in (part._parameters | part._buffers).items():
            if present is None or (id(part), name) not in values:
                continue
            key = f"{prefix}.{name}" if prefix else name
            for states in ("state_dict", "current_model_state"):
                stored = checkpoint.get(states, {}).get(key)
                if isinstance(stored, Tensor) and stored.data_ptr() == present.data_ptr():
                    checkpoint[states][key] = values[id(part), name]


@contextmanager
def isolated_copy(copy: nn.Module, trainer: pl.Trainer) -> Iterator[None]:
    """Let a copy of the model encode a batch of the run as the model would, without a trace in the run.

    The copy sees the trainer meanwhile. Random streams are restored, logging is muted.

    Args:
        copy: Copy of the model that is trained.
        trainer: The running trainer.
    """
    attached = [part for part in copy.modules() if isinstance(part, pl.LightningModule)]
    with preserved_random_state(), muted_logging(copy):
        for part in attached:
            part._trainer = trainer
        try:
            yield
        finally:
            for part in attached:
                part._trainer = None


@contextmanager
def _buffers_of_rank_zero(module: nn.Module, values: _Values) -> Iterator[None]:
    """Give every rank the buffers of rank 0, so that all encode by the encoder that a checkpoint holds.

    Each rank updates running means of batch norm by its own batches, and DDP makes them equal again only at
    the next training step. Afterwards each rank has its own again, whatever the encoders did with them.
    """
    ranks, own = Ranks.current(), BufferState(module)
    values += own.values
    for buffer in module.buffers():
        ranks.broadcast(buffer)
    try:
        yield
    finally:
        own.restore()


@contextmanager
def _evaluation_mode(module: nn.Module, values: _Values) -> Iterator[None]:
    """Put the module into evaluation mode; afterwards each submodule has its own mode again.

    Submodules with a `train` method of their own, such as those that merge low-rank updates into their
    weights, are put back through it, and their weights are what they were to the last bit.
    """
    # `train()` of the whole would un-freeze submodules that the user had put into evaluation mode.
    modes = {submodule: submodule.training for submodule in module.modules()}
    own = [submodule for submodule in modes if _has_own_train(submodule)]
    parts = {part for submodule in own for part in submodule.modules()}
    weights = {weight: weight.detach().clone() for part in parts for weight in part.parameters(recurse=False)}
    for part in parts:
        values += [
            (part, name, weights[weight]) for name, weight in part._parameters.items() if weight is not None
        ]
    module.eval()
    try:
        yield
    finally:
        for submodule in own:
            if submodule.training != modes[submodule]:
                submodule.train(modes[submodule])
        for submodule, mode in modes.items():
            if submodule.training != mode:
                submodule.training = mode
        with torch.no_grad():
            for weight, value in weights.items():
                if not torch.equal(weight, value):
                    weight.copy_(value)


def _has_own_train(module: nn.Module) -> bool:
    """Whether a module does something of its own when it changes its mode."""
    defined_by = next(kind for kind in type(module).__mro__ if "train" in vars(kind))
    return not defined_by.__module__.startswith(("torch.", "lightning.", "ask_lightning.encoding.names"))


@contextmanager
def preserved_dataset(dataset: object) -> Iterator[None]:
    """Restore the random generators that a dataset holds and the place of a stream, also after an error.

    Without worker processes a dataset is read in this process, and would go on from where the refresh left
    it. Looked for are generators of torch, NumPy and Python in the attributes of the dataset, of datasets in
    it, and in lists, tuples and mappings there. Of an `IterableDataset`, which may be its own iterator, all
    attributes become what they were; what is inside of them is not looked at.

    Args:
        dataset: Dataset that is read meanwhile.
    """
    kept = [restorer(source) for source in _generators_in(dataset, depth=6, seen=set())]
    attributes = dict(vars(dataset)) if isinstance(dataset, IterableDataset) else None
    try:
        yield
    finally:
        for restore in kept:
            restore()
        if attributes is not None:
            vars(dataset).clear()
            vars(dataset).update(attributes)


def _generators_in(value: Any, *, depth: int, seen: set[int]) -> Iterator[RandomSource]:
    """The random generators among an object's attributes and items."""
    if id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    if isinstance(value, RandomSource):
        yield value
        return
    if isinstance(value, Mapping) and len(value) <= _ITEMS_SEARCHED:
        inner = list(value.values())
    elif isinstance(value, list | tuple) and len(value) <= _ITEMS_SEARCHED:
        inner = list(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | Tensor):
        inner = list(vars(value).values())
    else:
        return
    for item in inner:
        yield from _generators_in(item, depth=depth - 1, seen=seen)


@contextmanager
def muted_logging(module: nn.Module) -> Iterator[None]:
    """Mute `self.log`, by which encoders would log as training batches what is none.

    Args:
        module: Module that is muted, with all modules in it.
    """
    muted = [submodule for submodule in module.modules() if isinstance(submodule, pl.LightningModule)]
    before = [vars(submodule).get("log") for submodule in muted]
    for submodule in muted:
        vars(submodule)["log"] = ignore_log
    try:
        yield
    finally:
        for submodule, log in zip(muted, before, strict=True):
            del vars(submodule)["log"]
            if log is not None:
                vars(submodule)["log"] = log


def ignore_log(*args: Any, **kwargs: Any) -> None:
    """Take the place of `LightningModule.log`; all arguments are ignored."""
    return None


@contextmanager
def _validation_stage(trainer: pl.Trainer) -> Iterator[None]:
    """Let batch transfer hooks that augment training batches see a validation batch."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global random streams of Python, NumPy and torch at the end, also after an error."""
    kept = RandomState()
    try:
        yield
    finally:
        kept.restore()
