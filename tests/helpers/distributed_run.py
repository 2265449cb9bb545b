"""Runs of a `Trainer` on several ranks, as the tests of this folder and their subprocesses start them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ask_lightning.data import EpochSampler
from tests.helpers.clients import AUDIO, Pairs, PlainTowers, Watcher, make_refresh, make_trainer, wrap

EPOCHS, T = 4, 2


class PairData(pl.LightningDataModule):
    """Pairs in an order that depends on the epoch only, of which each rank has its share of every batch."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        pairs, size = Pairs(48), self.trainer.world_size
        sampler = EpochSampler(pairs, num_replicas=size, rank=self.trainer.global_rank, seed=0)
        return DataLoader(pairs, self.batch_size // size, sampler=sampler, drop_last=True)


class NormedTowers(PlainTowers):
    """With running means, which each rank moves by its own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(AUDIO, momentum=0.5)

    def encode_audio(self, batch) -> Tensor:
        return self.audio_encoder(self.norm(batch["audio"]))


class Kill(pl.Callback):
    """Ends this process, or all, in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int, ranks: tuple[int, ...]) -> None:
        self.epoch, self.batch, self.ranks = epoch, batch, ranks

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (
            self.epoch,
            self.batch,
        ) and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(
    size: int,
    directory: Path | str | None = None,
    *,
    resume: Path | str | None = None,
    epochs: int = EPOCHS,
    loss: dict | None = None,
    extra: tuple[pl.Callback, ...] = (),
    batch_size: int = 8,
    strategy: str | None = None,
    precision: str | MixedPrecision = "64-true",
    accelerator: str = "cpu",
    normed: bool = False,
    **settings,
) -> dict:
    """What one of `size` ranks sees of a run whose global batch has `batch_size` pairs."""
    pl.seed_everything(1, verbose=False)
    model, watcher = NormedTowers() if normed else PlainTowers(), Watcher()
    callback = make_refresh(T, **settings)
    keep = [ModelCheckpoint(directory, save_last=True)] if directory else []
    run = make_trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=size,
        strategy=strategy or ("ddp" if size > 1 else "auto"),
        **({"precision": precision} if isinstance(precision, str) else {"plugins": [precision]}),
        callbacks=[callback, watcher, *extra, *keep],
        enable_checkpointing=bool(keep),
        gradient_clip_val=1.0,
    )
    module = wrap(model, {"gather": True} | (loss or {}))
    run.fit(module, datamodule=PairData(batch_size), ckpt_path=resume)
    base = module.loss.knowledge
    return {
        "losses": watcher.losses,
        "knowledge": watcher.knowledge,
        "clips": watcher.clips,
        "weights": model.state_dict(),
        "sharded": base.is_sharded,
        "bytes": base.num_bytes,
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
    }


if __name__ == "__main__":
    # python distributed_run.py STRATEGY OUTPUT DEVICES NODES
    strategy, output, devices, nodes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    model = PlainTowers()
    run = make_trainer(
        max_epochs=EPOCHS,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision="64-true",
        callbacks=[make_refresh(T)],
        gradient_clip_val=1.0,
    )
    run.fit(wrap(model, {"gather": True}), datamodule=PairData(8))
    if run.is_global_zero:
        torch.save(model.state_dict(), output)
