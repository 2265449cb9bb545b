"""A run of one rank that kills itself at a chosen moment.

python soak.py DIRECTORY LOG PLACEMENT KIND COUNT

KIND is what the process is doing when it dies (`step`, `refresh`, `snapshot`, `checkpoint`; `none`: it
lives), COUNT which time it does that.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import ModelCheckpoint

from ask_lightning.encoding import encode
from ask_lightning.knowledge import snapshot_file
from tests.helpers.clients import PlainTowers, make_refresh, make_trainer, wrap
from tests.helpers.distributed_run import PairData

EPOCHS, T = 8, 2


class Countdown:
    """Lets this process die at the n-th call, after `before` has been done."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, before: Any = None) -> None:
        self.count -= 1
        if self.count == 0:
            if before is not None:
                before()
            os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, count: int) -> Countdown | None:
    """Lay the mine."""
    die = Countdown(count)
    if kind == "step":
        return die
    if kind == "refresh":
        original = encode._check_batch
        encode._check_batch = lambda *batch: (die(), original(*batch))
    if kind == "snapshot":
        save = snapshot_file.save_file

        def save_half(tensors: Any, path: Path, metadata: Any) -> None:
            die(lambda: Path(path).write_bytes(b"half of it"))
            save(tensors, path, metadata=metadata)

        snapshot_file.save_file = save_half
    if kind == "checkpoint":
        # Lightning's way to write: all of it is in a file of another name, which is moved in the end.
        commit = LocalFileOpener.commit

        def die_or_commit(file: LocalFileOpener) -> None:
            die()
            commit(file)

        LocalFileOpener.commit = die_or_commit
    return None


class Diary(pl.Callback):
    """Writes down each step's loss and knowledge, for good."""

    def __init__(self, path: str, die: Countdown | None) -> None:
        self.path, self.die = path, die

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with open(f"{self.path}.{trainer.global_rank}", "a") as diary:
            loss, knowledge = float(outputs["loss"]).hex(), pl_module.loss.knowledge.fingerprint
            diary.write(f"{trainer.current_epoch} {batch_idx} {loss} {knowledge}\n")
        if self.die is not None:
            self.die()


if __name__ == "__main__":
    directory, log, placement, kind, count = sys.argv[1:]
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    diary = Diary(log, arm(kind, int(count)))
    # Lightning resumes inside an epoch without its place in the data, so not there.
    keep = ModelCheckpoint(directory, save_last=True)
    last = Path(directory) / "last.ckpt"
    run = make_trainer(
        max_epochs=EPOCHS,
        devices=2,
        strategy="ddp",
        callbacks=[make_refresh(T, placement=placement, batch_size=4), diary, keep],
        enable_checkpointing=True,
    )
    run.fit(
        wrap(PlainTowers(), {"gather": True}),
        datamodule=PairData(8),
        ckpt_path=last if last.exists() else None,
    )
