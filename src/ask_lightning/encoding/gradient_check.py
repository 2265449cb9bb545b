"""Checks of which parameters get no gradient from the loss, and of which DDP averages none."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class GradientCheck:
    """Points at parameters without a gradient; under DDP the next step would fail with an obscure error.

    Attributes:
        is_needed: Whether the check is still to be made.
    """

    def __init__(self) -> None:
        self.is_needed = True
        self._handles: list[RemovableHandle] = []
        self._watched: set[Tensor] | None = None  # those that got a gradient, where this is watched
        self._frozen: set[str] = set()  # names of parameters, at the start of training
        self._num_averaged = 0  # parameters of which DDP averages the gradients

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note what is frozen; watch the others where gradients do not stay, or become zeros (DeepSpeed).

        Args:
            trainer: Trainer at the start of training.
            module: Module that it trains.
        """
        self._forget()
        self._frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
        if (ddp := _ddp_of(trainer)) is not None:
            self._num_averaged = ddp._get_ddp_logging_data()["num_parameter_tensors"]
        if not self.is_needed or not isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        self._watched = set()
        self._handles = [
            weight.register_post_accumulate_grad_hook(self._watched.add)
            for weight in module.parameters()
            if weight.requires_grad
        ]

    def after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check that DDP averages all gradients, and once, when they are complete, that there are all.

        Args:
            trainer: Trainer after a backward pass.
            module: Module that it trains.

        Raises:
            RuntimeError: Parameters have no gradient under DDP, or were unfrozen behind its back; the message
                names them and says what to do.
        """
        ddp = _ddp_of(trainer)
        if ddp is not None and trainer.world_size > 1:
            self._check_averages(ddp, module)
        if not self.is_needed:
            return
        if ddp is not None and not ddp.require_backward_grad_sync:
            return
        self.is_needed = False
        ignored: Any = () if ddp is None else ddp.parameters_to_ignore
        idle = [
            name.replace("_fsdp_wrapped_module.", "")
            for name, weight in module.named_parameters()
            if self._is_idle(weight) and name not in ignored
        ]
        self._forget()
        if idle:
            _report(idle, is_refused=ddp is not None and not ddp.find_unused_parameters)

    def _check_averages(self, ddp: DistributedDataParallel, module: nn.Module) -> None:
        """Refuse parameters that DDP has not seen: those that were frozen when it was made."""
        if sum(weight.requires_grad for weight in ddp._module_parameters) <= self._num_averaged:
            return
        unfrozen = [
            name
            for name, weight in module.named_parameters()
            if weight.requires_grad and name in self._frozen
        ]
        raise RuntimeError(
            "Parameters were unfrozen after DDP was set up ("
            f"{', '.join(unfrozen) or 'at the start'}), which does not average their gradients then: "
            "each process would train them in its own way. Lightning's BaseFinetuning does so, also without "
            "ASK. Let them be trainable at first, freeze them by `requires_grad_` in a callback's "
            '`on_train_epoch_start`, and train with `strategy="ddp_find_unused_parameters_true"`.'
        )

    def _is_idle(self, weight: nn.Parameter) -> bool:
        # Under FSDP a rank may have no part of a parameter.
        if not weight.requires_grad or weight.numel() == 0:
            return False
        return weight.grad is None if self._watched is None else weight not in self._watched

    def _forget(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], None


def _ddp_of(trainer: pl.Trainer) -> DistributedDataParallel | None:
    wrapper = trainer.strategy.model
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None


def _report(idle: list[str], *, is_refused: bool) -> None:
    """Name the parameters without a gradient, in an error or a warning."""
    found = f"The parameters {', '.join(idle)} got no gradient, as they have no part in the ASK loss"
    use_it = (
        "If it is a temperature, let the new loss use it: `temperature=tau` with `def tau(model): return 1 / "
        "model.logit_scale.exp()`. If they are layers through which the step passes the embeddings, such as "
        "a projection, do that in the methods that encode audio and text. If they are those of an encoder in "
        "a reentrant checkpoint, which hands no gradient on where its input has none, pass "
        "`use_reentrant=False` to torch.utils.checkpoint."
    )
    if is_refused:
        raise RuntimeError(
            f"{found}, and DDP does not go on without one. {use_it} Else train with "
            '`strategy="ddp_find_unused_parameters_true"`, or freeze them.'
        )
    rank_zero_warn(
        f"{found}, so they are not trained. {use_it} If they belong to another loss of the training step, "
        "name the contrastive one, so that the others stay: ASKModule(model, criterion=...). If they are not "
        "meant to be trained, freeze them."
    )
