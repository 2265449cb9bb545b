"""A copy of the module that is trained, which sees the run as it was when the copy was made."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from ask_lightning.encoding.isolation import ignore_log
from ask_lightning.utilities.distributed import Ranks


class TrainingCopy:
    """A module as it is now, in evaluation mode, which another thread can use while the original is trained.

    The copy is not trained and logs nothing. It has a view of the trainer with the epoch and the step of this
    moment, in a validation stage, whose batches go through the copy's own hooks. The knowledge of its loss
    and the dataloaders are those of the run.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        epoch: The epoch that the copy sees.
        step: The number of optimiser steps that the copy sees.
        weights: Parameters and buffers to put in place of those of `module`, by name.

    Attributes:
        module: The copy.
        trainer: The view of the trainer.
        epoch: The epoch that the copy sees.
        step: The number of optimiser steps that the copy sees.

    Raises:
        RuntimeError: The module cannot be copied.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        *,
        epoch: int,
        step: int,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._original = module
        self.epoch, self.step = epoch, step
        self.trainer = _view_of(trainer, epoch, step)
        memo: dict[int, Any] = {id(trainer): self.trainer}
        if trainer.datamodule is not None:  # type: ignore[attr-defined]
            memo[id(trainer.datamodule)] = self.trainer.datamodule  # type: ignore[attr-defined]
        try:
            self.module = deepcopy(module, memo)
        except Exception as error:
            raise RuntimeError(
                f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), and what "
                "encodes in the background is a copy. Remove attributes that cannot be copied, such as open "
                "files and tensors with a graph, or leave `in_background` out."
            ) from error
        self.trainer.strategy._lightning_module = self.module
        self.module.requires_grad_(False)
        self.module.eval()
        for part in self.module.modules():
            if isinstance(part, pl.LightningModule):
                vars(part).update(_trainer=self.trainer, log=ignore_log)
        _overwrite(self.module, weights or {})

    def share_buffers(self, ranks: Ranks) -> None:
        """Take the buffers of rank 0, such as the running means of batch norm; collective.

        Args:
            ranks: The processes of the run.
        """
        for buffer in self.module.buffers():
            ranks.broadcast(buffer)

    def changed_weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the copy that the original has changed since, by name, on the CPU."""
        now = _tensors_of(self._original)
        return {
            name: value.detach().cpu().clone()
            for name, value in _tensors_of(self.module).items()
            if name not in now or not torch.equal(value, now[name])
        }


def _view_of(trainer: pl.Trainer, epoch: int, step: int) -> pl.Trainer:
    """A trainer like another one, whose epoch, step and stage stay what they are."""
    kind = type(trainer)
    view: Any = object.__new__(type(kind.__name__, (kind,), {"current_epoch": epoch, "global_step": step}))
    vars(view).update(vars(trainer))
    view.state = copy(trainer.state)
    view.state.stage = RunningStage.VALIDATING  # hooks that augment training batches leave others alone
    view.profiler = PassThroughProfiler()  # others refuse two actions of one name at the same time
    strategy = object.__new__(type(trainer.strategy))
    vars(strategy).update(vars(trainer.strategy))
    view._accelerator_connector = copy(trainer._accelerator_connector)
    view._accelerator_connector.strategy = strategy
    if view.datamodule is not None:
        view.datamodule = copy(view.datamodule)
        view.datamodule.trainer = view
    return view  # type: ignore[no-any-return]


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


@torch.no_grad()
def _overwrite(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put values in place of those of a module; the names have to be the module's."""
    tensors = _tensors_of(module)
    for name, value in weights.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise RuntimeError(
                f"The checkpoint holds a refresh that was in flight, with `{name}` {tuple(value.shape)}, "
                f"which {type(module).__name__} does not have. Resume with the model of the checkpoint."
            )
        tensors[name].copy_(value)
