"""Checks, before training starts, for what ASK cannot be combined with."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch._dynamo import OptimizedModule
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning.encoding.sharding import SHARDING_STRATEGIES, is_sharded
from ask_lightning.encoding.source_loader import batch_size_of
from ask_lightning.encoding.webdataset_source import has_epoch_of_its_own
from ask_lightning.losses.base import RetrievalLoss
from ask_lightning.utilities.distributed import Ranks

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
        RuntimeError: The model optimises manually, the strategy divides tensors or, by DeepSpeed, parameters,
            or is none of DDP, FSDP2, FSDP and DeepSpeed for several processes, or the device is an XLA one.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"The trainer is a `{type(trainer).__module__}.{type(trainer).__name__}`, but {_BUILT_ON} "
            "Use `lightning.pytorch.Trainer`, with all callbacks from the same package."
        )
    check_optimization(module)
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        _check_zero_stage(trainer.strategy)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _check_mesh(trainer.strategy)
    if isinstance(trainer.strategy, _XLA):
        raise RuntimeError(
            f"ASK does not support {type(trainer.strategy).__name__}: it has never run on an XLA device. "
            'Use `accelerator="gpu"` or `accelerator="cpu"`.'
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, (DDPStrategy, *SHARDING_STRATEGIES)):
        raise RuntimeError(
            f"ASK is not tested with {type(trainer.strategy).__name__}, which may not keep the same weights "
            'on every process. Use `strategy="ddp"` on several devices, `strategy="auto"` on one.'
        )


def check_optimization(module: pl.LightningModule) -> None:
    """Refuse a module that optimises manually, of whose training step Lightning ignores the loss.

    Args:
        module: Module that is trained.

    Raises:
        RuntimeError: The module optimises manually.
    """
    if not module.automatic_optimization:
        raise RuntimeError(
            "ASK does not support manual optimization, in which the model calls `backward` on its own loss. "
            "Set `automatic_optimization = True`, and return the loss from `training_step`."
        )


def _check_zero_stage(strategy: DeepSpeedStrategy) -> None:
    """Refuse the stage of ZeRO that divides parameters; the others divide gradients and optimiser states."""
    if strategy.zero_stage_3:
        raise RuntimeError(
            "ASK does not support DeepSpeedStrategy with stage 3 of ZeRO, which leaves each rank a part of "
            "every parameter, while a refresh encodes with whole ones. Stages 0 to 2 keep them whole: "
            "DeepSpeedStrategy(stage=2). Where they do not fit on a device, divide the model by FSDP2, "
            "`strategy=ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)`, or FSDP, "
            '`strategy="fsdp"`.'
        )


def _check_mesh(strategy: ModelParallelStrategy) -> None:
    """Refuse tensor parallelism, under which several ranks train on the same pairs."""
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise RuntimeError(
            f"ASK does not support tensor parallelism, but got ModelParallelStrategy with a "
            f"tensor_parallel_size of {size}: ranks that share a tensor train on the same pairs, which would "
            "be their own negatives. Divide the model by FSDP2 alone: ModelParallelStrategy("
            f"data_parallel_size={size * strategy.device_mesh['data_parallel'].size()}, "
            "tensor_parallel_size=1)."
        )


def check_sharding(trainer: pl.Trainer, loss: RetrievalLoss, chunk_size: int | None) -> None:
    """Refuse, for a model whose parameters are divided among ranks, what needs them whole.

    Args:
        trainer: Trainer at the start of `fit`.
        loss: Loss that the model is trained with.
        chunk_size: Argument `chunk_size` of `ASKModule`.

    Raises:
        RuntimeError: The encoders get batches in chunks, or the loss keeps a copy of the model.
    """
    if not is_sharded(trainer):
        return
    strategy = type(trainer.strategy).__name__
    if chunk_size is not None:
        raise RuntimeError(
            f"`chunk_size` cannot be combined with {strategy}, which frees the parameters between the two "
            "passes over a chunk. Leave it out and save memory by activation checkpointing, or train with "
            '`strategy="ddp"`.'
        )
    if loss.needs_keys:
        raise RuntimeError(
            f"{type(loss).__name__} cannot be combined with {strategy}, because it keeps a moving average of "
            "the model, and a model that is divided cannot be copied. Use CrossBatchMemoryLoss, whose "
            'negatives come from earlier batches too, or `strategy="ddp"`.'
        )


def warn_of_single_pair(trainer: pl.Trainer) -> None:
    """Warn if the last batch of every epoch will hold one pair, which has nothing to be contrasted with.

    Args:
        trainer: Trainer at the start of training.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.drop_last or loader.batch_size is None:
        return
    if loader.batch_size < 2 or isinstance(loader.dataset, IterableDataset):
        return
    rows = len(loader.sampler)  # type: ignore[arg-type]
    if rows % loader.batch_size == 1 and trainer.num_training_batches == len(loader):
        rank_zero_warn(
            f"The last batch of each epoch holds a single pair ({rows} pairs in batches of "
            f"{loader.batch_size}), which has nothing to be contrasted with. Set `drop_last=True` on the "
            "training loader, or another batch size."
        )


def warn_of_uneven_streams(trainer: pl.Trainer, counts: Sequence[int]) -> None:
    """Warn if the processes will have different numbers of training batches, for which DDP waits forever.

    Args:
        trainer: The running trainer, whose training data are a stream without a length.
        counts: Number of pairs that each process reads of it.
    """
    loader: Any = trainer.train_dataloader
    if trainer.num_training_batches != float("inf") or has_epoch_of_its_own(loader):
        return
    size = batch_size_of(loader) or 1
    if len({-(-count // size) for count in counts}) > 1:
        rank_zero_warn(
            f"The processes read {', '.join(map(str, counts))} pairs of the training stream, so some have "
            "more batches than others, and DDP waits for those that have none. Give all the same number: "
            "WebLoader(...).with_epoch(batches), or Trainer(limit_train_batches=...)."
        )


def warn_of_uneven_batches(trainer: pl.Trainer, ranks: Ranks) -> None:
    """Warn if loaders with lengths give the processes different numbers of training batches; collective.

    Args:
        trainer: The running trainer.
        ranks: The processes of the run.
    """
    counts = ranks.all_gather_object(trainer.num_training_batches)
    if len(set(counts)) > 1:
        rank_zero_warn(
            f"The processes have {', '.join(map(str, counts))} training batches in an epoch, and DDP waits "
            "for those that have none left. Give all the same number: drop_last=True where litdata or a "
            f"sampler divides the rows, or Trainer(limit_train_batches={min(counts)})."
        )


def check_finders(trainer: pl.Trainer) -> None:
    """Refuse searches that Lightning runs at the start of `fit` with all other callbacks disabled.

    Args:
        trainer: Trainer whose callback builds the knowledge.

    Raises:
        RuntimeError: The trainer has such a search; the message says how to search and train in turn.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
            search = "lr_find" if isinstance(callback, LearningRateFinder) else "scale_batch_size"
            raise RuntimeError(
                f"{type(callback).__name__} disables all other callbacks while it searches, so there would "
                "be no knowledge to train with. Search with the plain model first, then train with ASK: "
                f"Tuner(Trainer(...)).{search}(ask_module.model, ...) with a trainer of its own."
            )
