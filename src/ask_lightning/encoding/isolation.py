"""Isolation of a refresh from training: all state that it changes is restored, also after an error."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import nn

from ask_lightning.utilities.distributed import Ranks


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
        stack.enter_context(preserved_random_state())
        stack.enter_context(_buffers_of_rank_zero(module))
        stack.enter_context(_evaluation_mode(module))
        stack.enter_context(_muted_logging(module))
        stack.enter_context(_validation_stage(trainer))
        yield


@contextmanager
def isolated_copy(copy: nn.Module, trainer: pl.Trainer) -> Iterator[None]:
    """Let a copy of the model encode a batch of the run as the model would, without a trace in the run.

    The copy sees the trainer meanwhile. Random streams are restored, logging is muted.

    Args:
        copy: Copy of the model that is trained.
        trainer: The running trainer.
    """
    attached = [part for part in copy.modules() if isinstance(part, pl.LightningModule)]
    with preserved_random_state(), _muted_logging(copy):
        for part in attached:
            part._trainer = trainer
        try:
            yield
        finally:
            for part in attached:
                part._trainer = None


@contextmanager
def _buffers_of_rank_zero(module: nn.Module) -> Iterator[None]:
    """Give every rank the buffers of rank 0, so that all encode by the encoder that a checkpoint holds.

    Each rank updates running means of batch norm by its own batches, and DDP makes them equal again only at
    the next training step.
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
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode; afterwards each submodule has its own mode again."""
    # `train()` afterwards would un-freeze submodules that the user had put into evaluation mode.
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


@contextmanager
def _muted_logging(module: nn.Module) -> Iterator[None]:
    """Mute `self.log`, by which encoders would log batches of the source as training batches."""
    muted = [submodule for submodule in module.modules() if isinstance(submodule, pl.LightningModule)]
    before = [vars(submodule).get("log") for submodule in muted]
    for submodule in muted:
        vars(submodule)["log"] = _ignore_log
    try:
        yield
    finally:
        for submodule, log in zip(muted, before, strict=True):
            del vars(submodule)["log"]
            if log is not None:
                vars(submodule)["log"] = log


def _ignore_log(*args: Any, **kwargs: Any) -> None:
    """Take the place of `LightningModule.log`."""
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
