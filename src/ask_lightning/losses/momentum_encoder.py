"""A copy of a model whose weights are a moving average of the model's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MomentumEncoder:
    """A model's momentum copy: θ' ← m θ' + (1 - m) θ after each optimiser step; buffers are copied.

    Not a module, so that its weights are nobody's parameters. It moves when it is asked for, at most once for
    each optimiser step: what it gives for a batch is what an update right after the step would give.

    Args:
        momentum: m in [0, 1).

    Attributes:
        momentum: m, which a schedule may change.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 1.0)
        >>> encoder = MomentumEncoder(0.75)
        >>> encoder.start(model, step=0)
        >>> _ = nn.init.constant_(model.weight, 2.0)  # an optimiser step
        >>> encoder.follow(model, step=1).weight.item()
        1.25
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._average: AveragedModel | None = None
        self._step = 0
        self._to_restore: dict[str, Any] | None = None

    def start(self, model: nn.Module, step: int) -> None:
        """Copy the model, unless there is a copy already.

        Args:
            model: Model to copy, and then to follow.
            step: Number of optimiser steps that its weights have behind them.

        Raises:
            ValueError: The model is trained in half precision, or the state that was loaded belongs to
                another model.
        """
        if self._average is not None:
            return
        _check_precision(model)
        self._average = AveragedModel(model)
        self._average.n_averaged.fill_(1)  # at 0 the first update would only copy
        self._average.requires_grad_(False)
        self._step = step
        if self._to_restore is not None:
            state, self._to_restore = self._to_restore, None
            self._step = state["step"]
            self._restore(state["weights"])

    def follow(self, model: nn.Module, step: int) -> nn.Module:
        """Move towards the model if it has been trained since.

        Args:
            model: Model to follow.
            step: Number of optimiser steps that its weights have behind them.

        Returns:
            The copy; each of its submodules in the training mode of the model's.
        """
        self.start(model, step)
        assert self._average is not None
        copy: nn.Module = self._average.module
        _move_as(copy, model)
        if step != self._step:
            self._average.multi_avg_fn = partial(_average_weights, self.momentum)
            self._average.update_parameters(model)
            self._step = step
        for ours, theirs in zip(copy.modules(), model.modules(), strict=True):
            ours.training = theirs.training
        return copy

    def clear(self) -> None:
        """Forget the copy."""
        self._average = self._to_restore = None

    def state_dict(self) -> dict[str, Any]:
        """Weights and buffers of the copy by name, and the step that it has followed to, if there is one."""
        if self._average is None:
            return self._to_restore or {}
        return {"step": self._step, "weights": _tensors(self._average.module)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the next copy, which is made when training starts.

        Args:
            state: The `state_dict` of another encoder.
        """
        self.clear()
        self._to_restore = state or None

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        """Overwrite the copy's tensors with stored ones."""
        assert self._average is not None
        own = _tensors(self._average.module)
        shapes, stored = ({name: value.shape for name, value in side.items()} for side in (own, weights))
        if shapes != stored:
            names = [name for name in sorted({*own, *weights}) if shapes.get(name) != stored.get(name)]
            raise ValueError(
                f"The checkpoint's momentum encoder is of another model: {', '.join(names)} differ. Start a "
                "new run from its weights instead of resuming."
            )
        for name, value in own.items():
            value.copy_(weights[name])


def _average_weights(
    momentum: float, averages: Sequence[Tensor], weights: Sequence[Tensor], num_averaged: Tensor | int
) -> None:
    """Move averages; at the top level of the module, so that an encoder can be pickled."""
    get_ema_multi_avg_fn(momentum)(averages, weights, num_averaged)


def _check_precision(model: nn.Module) -> None:
    """Refuse weights whose rounding would swallow the small steps of the average."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"The moving average of {name} in {weight.dtype} would stand still: its steps are smaller "
                'than the dtype can tell. Train with `precision="bf16-mixed"` or "32-true".'
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model by name; its `state_dict` may leave some out."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach() for name, value in named}


def _move_as(copy: nn.Module, model: nn.Module) -> None:
    """Bring a copy to the device and the dtype of the model, where it is elsewhere."""
    pairs = (
        *zip(copy.parameters(), model.parameters(), strict=True),
        *zip(copy.buffers(), model.buffers(), strict=True),
    )
    for ours, theirs in pairs:
        if (ours.device, ours.dtype) != (theirs.device, theirs.dtype):
            ours.data = ours.data.to(theirs.device, theirs.dtype)
