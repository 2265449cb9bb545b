"""Checks, before training starts, for what ASK cannot be combined with."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

_SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
_XLA = (SingleDeviceXLAStrategy, XLAStrategy)
_BUILT_ON = "ask_lightning is built on `lightning.pytorch`, and the two do not know each other's classes."


def check_model(model: object) -> None:
    """Refuse a model that is not a `lightning.pytorch` module.

    Args:
        model: Model to wrap.

    Raises:
        TypeError: The model is of another class. For a module of the twin package `pytorch_lightning`, the
            message says which import to change.
    """
    if isinstance(model, OptimizedModule):
        raise TypeError(
            "Argument `model` has to be a `lightning.pytorch.LightningModule`, but got a compiled one. Wrap "
            "it first and compile then: torch.compile(ASKModule(model))."
        )
    if isinstance(model, pl.LightningModule):
        return
    if any(base.__module__.split(".")[0] == "pytorch_lightning" for base in type(model).__mro__):
        raise TypeError(
            f"Argument `model` is a module of the `pytorch_lightning` package, but {_BUILT_ON} In its file "
            "replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`."
        )
    raise TypeError(
        f"Argument `model` has to be a `lightning.pytorch.LightningModule`, but got {type(model).__name__}. "
        "Put it into one that has `configure_optimizers` and the two embedding methods."
    )


def check_trainer(trainer: object, module: pl.LightningModule) -> None:
    """Refuse trainers and strategies under which ASK would be wrong.

    Args:
        trainer: Trainer at the start of `fit`.
        module: Module that it trains.

    Raises:
        TypeError: The trainer is one of the `pytorch_lightning` package.
        RuntimeError: The model optimises manually, the strategy shards the model or is not DDP for several
            processes, or the device is an XLA device.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"The trainer is a `{type(trainer).__module__}.{type(trainer).__name__}`, but {_BUILT_ON} "
            "Use `lightning.pytorch.Trainer`, with all callbacks from the same package."
        )
    if not module.automatic_optimization:
        raise RuntimeError(
            "ASK does not support manual optimization, in which the model calls `backward` on its own loss. "
            "Set `automatic_optimization = True`, or call a ReliabilityOTLoss in your own `training_step`."
        )
    if isinstance(trainer.strategy, _SHARDING):
        raise RuntimeError(
            f"ASK does not support {type(trainer.strategy).__name__}, under which no process holds the "
            'whole encoder at a refresh. Use `strategy="ddp"` on several devices, `strategy="auto"` on one.'
        )
    if isinstance(trainer.strategy, _XLA):
        raise RuntimeError(
            f"ASK does not support {type(trainer.strategy).__name__}: it has never run on an XLA device. "
            'Use `accelerator="gpu"` or `accelerator="cpu"`.'
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise RuntimeError(
            f"ASK is not tested with {type(trainer.strategy).__name__}, which may not keep the same weights "
            'on every process. Use `strategy="ddp"` on several devices, `strategy="auto"` on one.'
        )


def check_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Refuse parameters without a gradient under DDP, whose next step would fail with an obscure error.

    Args:
        trainer: Trainer after a backward pass.
        module: Module that it trains.

    Returns:
        Whether the check is complete. It is not while gradients are still being accumulated.

    Raises:
        RuntimeError: Parameters have no gradient; the message names them and says what to do.
    """
    wrapper = trainer.strategy.model
    if not isinstance(wrapper, DistributedDataParallel) or wrapper.find_unused_parameters:
        return True
    if not wrapper.require_backward_grad_sync:
        return False
    idle = [
        name
        for name, weight in module.named_parameters()
        if weight.requires_grad and weight.grad is None and name not in wrapper.parameters_to_ignore
    ]
    if idle:
        raise RuntimeError(
            f"The parameters {', '.join(idle)} got no gradient, as they have no part in the ASK loss, and "
            "DDP does not go on without one. If it is a temperature, use it: "
            "ReliabilityOTLoss(temperature=lambda: 1 / model.logit_scale.exp()). Else train with "
            '`strategy="ddp_find_unused_parameters_true"`, or freeze them.'
        )
    return True


def check_finders(trainer: pl.Trainer) -> None:
    """Refuse searches that Lightning runs at the start of `fit` with all other callbacks disabled.

    Args:
        trainer: Trainer whose callback builds the knowledge.

    Raises:
        RuntimeError: The trainer has such a search; the message says how to search and train in turn.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
            raise RuntimeError(
                f"{type(callback).__name__} disables all other callbacks while it searches, so there would "
                "be no knowledge to train with. Search with the plain model first, then train with ASK: "
                "Tuner(Trainer(...)).lr_find(ask_module.model, ...) with a trainer of its own."
            )
