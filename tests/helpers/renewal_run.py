"""Runs whose knowledge is renewed row by row, on one rank or several, and what was seen of it."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.functional import unit_length
from tests.helpers.clients import MemoryLogger, Pairs, PlainTowers, Watcher, make_trainer
from tests.helpers.distributed_run import PairData

PAIRS, BATCH, STEPS = 48, 8, 6


def embedded(model: PlainTowers, pairs: Pairs | None = None) -> tuple[Tensor, Tensor]:
    """All pairs by the present encoders."""
    pairs = pairs or Pairs(PAIRS)
    with torch.no_grad():
        batch = {"audio": pairs.audio, "text": pairs.text}
        dtype = model.audio_encoder.weight.dtype
        batch = {name: side.to(dtype) for name, side in batch.items()}
        return unit_length(model.encode_audio(batch)), unit_length(model.encode_text(batch))


class Trace(pl.Callback):
    """The stored audio and the encoders' own before the first step of each epoch."""

    def __init__(self) -> None:
        self.stored: list[Tensor] = []
        self.fresh: list[Tensor] = []
        self.prototypes: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 0:
            base = pl_module.loss.knowledge
            self.stored.append(base.fine.audio.clone())
            self.prototypes.append(base.coarse.audio.clone())
            pairs = Pairs(len(trainer.train_dataloader.dataset))
            self.fresh.append(embedded(pl_module.model, pairs)[0].float())


def fit(
    size: int = 1,
    directory: Path | None = None,
    *,
    resume: Path | None = None,
    epochs: int = 5,
    model: pl.LightningModule | None = None,
    loss=None,
    refresh: KnowledgeRefreshCallback | None = None,
    extra: tuple[pl.Callback, ...] = (),
    data: pl.LightningDataModule | None = None,
    ids: str | None = "clip_id",
    caption_ids: str | None = None,
    learning_rate: float = 1e-2,
    **settings,
) -> dict:
    """A run with `KnowledgeRefreshCallback(**settings)` as one of `size` ranks sees it."""
    pl.seed_everything(1, verbose=False)
    model = model or PlainTowers(learning_rate)
    watcher, trace, logger = Watcher(), Trace(), MemoryLogger()
    refresh = refresh or KnowledgeRefreshCallback(**({"num_prototypes": 6} | settings))
    keep = [ModelCheckpoint(directory, save_last=True)] if directory else []
    run = make_trainer(
        max_epochs=epochs,
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        callbacks=[refresh, watcher, trace, *extra, *keep],
        enable_checkpointing=bool(keep),
        logger=logger,
    )
    module = ASKModule(
        model, loss or ReliabilityOTLoss(num_neighbors=4, gather=True), ids=ids, caption_ids=caption_ids
    )
    run.fit(module, datamodule=data or PairData(BATCH), ckpt_path=resume)
    return {
        "losses": watcher.losses,
        "knowledge": watcher.knowledge,
        "clips": watcher.clips,
        "weights": model.state_dict(),
        "stored": trace.stored,
        "fresh": trace.fresh,
        "prototypes": trace.prototypes,
        "logged": logger.rows,
    }


def logged(run: dict, name: str) -> list[float]:
    """All values of one metric."""
    return [row[name] for _, row in run["logged"] if name in row]


def assert_goes_on(resumed: dict, whole: dict, first_epoch: int) -> None:
    """The resumed run is the rest of the whole one, to the bit."""
    rest = slice(first_epoch * STEPS, None)
    for name in ("losses", "knowledge", "clips"):
        assert resumed[name] == whole[name][rest], name
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
