"""Models whose parameters are divided among the ranks: by FSDP2 (`fully_shard`) or by FSDP.

A rank holds a part of each parameter. When a module runs, all ranks put the parts together, so all of them
have to run it equally often. Whatever else a model has, such as a temperature, is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")

SHARDING_STRATEGIES = (ModelParallelStrategy, FSDPStrategy)
"""Strategies that divide parameters, under which models can be trained here."""

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether a forward pass of a trainer's model needs all ranks.

    Args:
        trainer: The running trainer.
    """
    return isinstance(trainer.strategy, SHARDING_STRATEGIES)


def whole_parameters(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, nn.Parameter]:
    """The parameters that every rank holds as a whole, by name.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        return {}  # it takes them all
    return {name: weight for name, weight in module.named_parameters() if not isinstance(weight, DTensor)}


def average_whole_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Average the gradients of parameters that are left whole over the ranks; collective.

    FSDP2 averages the gradients of what it divides. The rest, such as a temperature, would follow each rank's
    own batches, and the ranks would soon train different models.

    Args:
        trainer: A trainer after a backward pass.
        module: The module that it trains.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy) or trainer.world_size == 1:
        return
    learned = [weight for weight in whole_parameters(trainer, module).values() if weight.requires_grad]
    for dtype in {weight.dtype: None for weight in learned}:
        weights = [weight for weight in learned if weight.dtype == dtype]
        # On every rank the same ones, with those that have no part in this rank's batch.
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in weights]
        flags = torch.tensor([weight.grad is not None for weight in weights], dtype=dtype)
        total = torch.cat([flags.to(parts[0].device), *(part.flatten() for part in parts)])
        dist.all_reduce(total)
        counts, *sums = total.split([len(weights), *(part.numel() for part in parts)])
        for weight, count, values in zip(weights, counts, sums, strict=True):
            if weight.grad is not None or count > 0:
                weight.grad = (values / trainer.world_size).view_as(weight)


def enter_by_methods(model: pl.LightningModule, encoders: tuple[object, object]) -> None:
    """Let FSDP2 put the parameters of a model together that is divided as a whole, `fully_shard(self)`.

    FSDP2 does so where `forward` is called, which neither Lightning nor a refresh calls: the model's steps
    and its encoders become such methods, too. Those that the model has made so itself stay as they are.

    Args:
        model: The user's model after its `configure_model`.
        encoders: The audio and the text encoder; those that are not names of methods are left out.
    """
    if isinstance(model, FSDPModule):
        steps = [name for name in _STEPS if is_overridden(name, model)]
        for name in [*steps, *(name for name in encoders if isinstance(name, str))]:
            if name not in vars(model):
                register_fsdp_forward_method(model, name)


def through_strategy(
    trainer: pl.Trainer, module: pl.LightningModule, function: Callable[[Any], T]
) -> Callable[[Any], T]:
    """The function, called inside of the forward pass of what the strategy has wrapped around the module.

    FSDP wraps the module and puts parameters together in its own forward pass only. DDP's wrapper is left
    out: outside of training it does nothing but wait for ranks that have more batches.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        function: A function of a batch that calls the module's methods.
    """
    wrapped = trainer.strategy.model
    if not isinstance(wrapped, FullyShardedDataParallel):
        return function

    def call(batch: Any) -> T:
        with _as_forward(module, function):
            return wrapped(batch)  # type: ignore[no-any-return]

    return call


@contextmanager
def _as_forward(module: nn.Module, function: Callable[[Any], Any]) -> Iterator[None]:
    """Put a function in place of a module's `forward`."""
    before = {key: value for key, value in vars(module).items() if key == "forward"}
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def release_parameters(module: nn.Module) -> None:
    """Let go of parameters that FSDP2 keeps together after a forward pass, for a backward pass to come.

    Args:
        module: The module after forward passes without gradient.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
