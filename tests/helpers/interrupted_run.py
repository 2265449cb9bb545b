"""A run that is stopped and resumed; as a script, one that kills itself.

python interrupted_run.py DIRECTORY EPOCH BATCH
"""

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.clients import NEUTRAL, PlainTowers, Watcher, make_loader, make_refresh, make_trainer, wrap

EPOCHS, T, STEPS = 6, 2, 6


class Stopped(Exception):
    """Stands for whatever ends a run."""


class Stop(pl.Callback):
    """Ends the run in the middle of an epoch."""

    def __init__(self, epoch: int, batch: int = 3, *, kill: bool = False) -> None:
        self.epoch, self.batch, self.kill = epoch, batch, kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stopped


def fit(
    directory: Path,
    *,
    resume: Path | str | None = None,
    stop: Stop | None = None,
    ask: bool = True,
    neutral: bool = False,
    every_n_train_steps: int | None = None,
    epochs: int = EPOCHS,
    model: pl.LightningModule | None = None,
    **settings,
):
    """Six epochs with a refresh every second one; the model, what was seen, and the callback."""
    pl.seed_everything(1, verbose=False)
    model = PlainTowers() if model is None else model
    watcher = Watcher()
    callback = make_refresh(T, **settings)
    often = {"every_n_train_steps": every_n_train_steps} if every_n_train_steps else {}
    keep = ModelCheckpoint(directory, save_last=True, **often)
    callbacks = [*([callback] if ask else []), watcher, *([stop] if stop else []), keep]
    module = wrap(model, NEUTRAL if neutral else None) if ask else model
    run = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
    run.fit(module, make_loader(), ckpt_path=resume)
    return model, watcher, callback


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), stop=Stop(int(sys.argv[2]), int(sys.argv[3]), kill=True))
