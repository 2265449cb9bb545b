"""Runs of models whose parameters are divided among ranks, and the same runs without that."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ask_lightning import ASKModule
from ask_lightning.losses import RetrievalLoss
from tests.helpers.clients import (
    AUDIO,
    WIDTH,
    Pairs,
    PlainTowers,
    Watcher,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.deepspeed_strategy import DeepSpeedAnywhere
from tests.helpers.distributed_run import PairData

EPOCHS, T, STEPS = 3, 2, 3


class LargeTowers(PlainTowers):
    """Divides its parameters as the class attribute says, where the strategy has a mesh of devices."""

    divided = "parts"

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.audio_encoder = nn.Sequential(
            nn.Linear(AUDIO, 9), nn.BatchNorm1d(9, momentum=0.5), nn.GELU(), nn.Linear(9, WIDTH)
        )
        self.log_temperature = nn.Parameter(torch.tensor(-2.0))

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        mesh, ignored = self.device_mesh["data_parallel"], {self.log_temperature}
        parts = {
            "parts": (self.audio_encoder[0], self.audio_encoder, self.text_encoder),
            "some": (self.audio_encoder,),
            "whole": (self.audio_encoder[0], self),
        }
        for part in parts[self.divided]:
            fully_shard(part, mesh=mesh, ignored_params=ignored)

    def validation_step(self, batch, batch_idx):
        loss = self.contrast(self.encode_audio(batch), self.encode_text(batch))
        self.log("val/loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9)


class ValidatedPairs(PairData):
    """Validated before the first refresh and after each epoch, as the divided model itself sees fit."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Pairs(16, seed=1), 4)


class TowersInParts(LargeTowers):
    pass


class TowersInSomeParts(LargeTowers):
    """The text encoder is left whole."""

    divided = "some"


class TowersAsAWhole(LargeTowers):
    """With a projection that belongs to no smaller part."""

    divided = "whole"


class FlatTowers(LargeTowers):
    """For FSDP, which takes no parameters without an axis."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.log_temperature = nn.Parameter(torch.tensor([-2.0]))


class MetaTowers(LargeTowers):
    """Made without memory; the strategy has its parts initialised when they are divided."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_temperature, -2.0)


class CriterionTowers(LargeTowers):
    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.criterion = self.contrast

    def training_step(self, batch, batch_idx):
        return self.criterion(self.encode_audio(batch), self.encode_text(batch))


class FSDPAnywhere(FSDPStrategy):
    """Lightning and torch refuse FSDP on a CPU, where it works if it is told the device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        device = torch.device("cpu")
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=device, **self.kwargs
        )

    def lightning_module_state_dict(self) -> dict:
        if self.root_device.type != "cpu" or self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        # Moved "to the CPU", tensors that are there already would lose their memory.
        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, whole):
            return {name: value.clone() for name, value in self.model.state_dict().items()}


def strategy_of(kind: str, size: int, *, single_file: bool = True):
    if kind.startswith("deepspeed"):
        return DeepSpeedAnywhere(stage=int(kind[-1]))
    if kind == "fsdp2":
        return ModelParallelStrategy(size, 1, save_distributed_checkpoint=not single_file)
    if kind in ("fsdp", "fsdp_grad_op"):
        sharding = "FULL_SHARD" if kind == "fsdp" else "SHARD_GRAD_OP"
        return FSDPAnywhere(
            auto_wrap_policy={nn.Linear},
            sharding_strategy=sharding,
            state_dict_type="full" if single_file else "sharded",
        )
    return "ddp" if size > 1 else "auto"


class StateWatcher(pl.Callback):
    """Notes running means around refreshes, and whether parameters are divided when a batch comes."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.divided: list[bool] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.before.append(running_mean(pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0 and trainer.current_epoch > 0:
            self.after.append(running_mean(pl_module))
        self.divided.append(any(isinstance(one, DTensor) for one in pl_module.parameters()))


def running_mean(module: pl.LightningModule) -> Tensor:
    return next(value.clone() for name, value in module.named_buffers() if "running_mean" in name)


def tau(model: LargeTowers) -> Tensor:
    return model.log_temperature.exp()


def fit(
    kind: str,
    size: int,
    directory: str | Path | None = None,
    *,
    resume: str | Path | None = None,
    client: type[LargeTowers] = TowersInParts,
    epochs: int = EPOCHS,
    rows: int = 51,
    normed: bool = False,
    single_file: bool = True,
    loss: dict | RetrievalLoss | None = None,
    options: dict | None = None,
    data: type[PairData] = ValidatedPairs,
    accelerator: str = "cpu",
    extra: tuple[pl.Callback, ...] = (),
    **settings,
) -> dict:
    """What one of `size` ranks sees of a run whose global batch has 8 pairs."""
    pl.seed_everything(1, verbose=False)
    watcher, states = Watcher(), StateWatcher()
    callback = make_refresh(**({"T": T, "source": Pairs(rows, seed=2), "batch_size": 5} | settings))
    keep = [ModelCheckpoint(directory, save_last=True)] if directory else []
    run = make_trainer(
        max_epochs=epochs,
        limit_train_batches=STEPS,
        limit_val_batches=2,
        accelerator=accelerator,
        devices=size,
        strategy=strategy_of(kind, size, single_file=single_file),
        callbacks=[callback, watcher, states, *extra, *keep],
        enable_checkpointing=bool(keep),
    )
    with run.init_module(empty_init=True) if client is MetaTowers else nullcontext():
        model = client()
    model.audio_encoder[1].train(normed)  # the statistics of a batch are those of a rank
    if isinstance(loss, RetrievalLoss):
        module = ASKModule(model, loss, **(options or {}))
    else:
        module = wrap(model, {"gather": True, "temperature": tau} | (loss or {}), **(options or {}))
    run.fit(module, datamodule=data(8), ckpt_path=resume)
    return {
        "losses": watcher.losses,
        "knowledge": watcher.knowledge,
        "pairs": module.loss.knowledge.fine.audio,
        "validation": float(run.callback_metrics["val/loss"]),
        "weights": run.strategy.lightning_module_state_dict(),
        "divided": states.divided,
        "means": (states.before, states.after),
        "num_encoded": callback.num_encoded,
    }
