"""A run over a stateful loader that is stopped inside an epoch; as a script, one that kills itself.

python stateful_run.py DIRECTORY LOADER LOSS EPOCH BATCH
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ask_lightning import ASKModule, InfluenceMonitor, ReliabilityOTLoss
from ask_lightning.callbacks import LoaderStateCallback
from ask_lightning.losses import CrossBatchMemoryLoss
from tests.helpers.clients import (
    EpochSeededSampler,
    MemoryLogger,
    Pairs,
    PlainTowers,
    Watcher,
    make_refresh,
    make_trainer,
)
from tests.helpers.interrupted_run import Stop

EPOCHS, STEPS, T = 4, 6, 2
OF_EPOCHS = ("second", "knowledge_age", "mean_similarity", "rdm_")


class Stream(IterableDataset):
    """Pairs in their order, divided among the workers."""

    def __init__(self) -> None:
        self.pairs = Pairs(48)

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.pairs[row] for row in range(first, len(self.pairs), step))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.pairs)


def make_stateful(kind: str, num_workers: int = 0) -> DataLoader:
    from torchdata.stateful_dataloader import StatefulDataLoader

    pairs, settings = Pairs(48), {"batch_size": 8, "num_workers": num_workers}
    if kind == "shuffle":
        return StatefulDataLoader(pairs, shuffle=True, drop_last=True, **settings)
    if kind == "generator":
        generator = torch.Generator().manual_seed(3)
        return StatefulDataLoader(pairs, shuffle=True, generator=generator, **settings)
    if kind == "epoch sampler":
        return StatefulDataLoader(pairs, sampler=EpochSeededSampler(48), **settings)
    return StatefulDataLoader(SizedStream() if kind == "sized stream" else Stream(), **settings)


def make_loss(name: str):
    if name == "queue":
        return CrossBatchMemoryLoss(memory_size=40, start_step=3)
    return ReliabilityOTLoss(num_neighbors=4)


def fit(
    directory: Path,
    make_loader: Callable[[], DataLoader],
    loss: str = "reliability",
    *,
    resume: Path | str | None = None,
    stop: Stop | None = None,
    every_n_train_steps: int | None = 1,
    epochs: int = EPOCHS,
    source=None,
    limit: int | None = None,
) -> dict:
    """What a run of four epochs with a refresh every second one ends with, and what it saw on the way."""
    pl.seed_everything(1, verbose=False)
    loader = make_loader()  # which may draw the seed of its order
    model, watcher, logger = PlainTowers(), Watcher(), MemoryLogger()
    often = {"every_n_train_steps": every_n_train_steps} if every_n_train_steps else {}
    callbacks = [
        make_refresh(T, source),
        watcher,
        *([InfluenceMonitor(2)] if loss == "reliability" else []),
        LoaderStateCallback(),
        *([stop] if stop else []),
        ModelCheckpoint(directory, save_last=True, **often),
    ]
    module = ASKModule(model, make_loss(loss), ids="clip_id")
    run = make_trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=True,
        logger=logger,
        log_every_n_steps=1,
        limit_train_batches=limit,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "needs no knowledge|CrossBatchMemoryLoss")
        run.fit(module, loader, ckpt_path=resume)
    base = module.loss.knowledge
    queue = {name: value for name, value in module.loss.state_dict().items() if torch.is_tensor(value)}
    return {
        "steps": run.global_step,
        "clips": watcher.clips,
        "losses": watcher.losses,
        "knowledge": watcher.knowledge,
        "tensors": {
            "weights": model.state_dict(),
            "optimizer": run.optimizers[0].state_dict()["state"],
            "queue": queue,
            "base": {"audio": base.fine.audio, "ids": base.ids, "coarse": base.coarse.text},
        },
        "logged": by_step(logger),
    }


def by_step(logger: MemoryLogger) -> dict[int, dict[str, float]]:
    """What was logged of each step: without what is of a refresh or of a whole epoch."""
    logged: dict[int, dict[str, float]] = {}
    for step, row in logger.rows:
        values = {name: value for name, value in row.items() if not any(part in name for part in OF_EPOCHS)}
        logged.setdefault(step, {}).update(values)
    return logged


def main(where: str, kind: str, loss: str, epoch: str, batch: str) -> None:
    stop = Stop(int(epoch), int(batch), kill=True)
    fit(Path(where), partial(make_stateful, kind), loss, stop=stop)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from tests.helpers import stateful_run  # whose classes have the names that the resumed run finds

    stateful_run.main(*sys.argv[1:])
