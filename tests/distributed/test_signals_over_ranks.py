"""Signals of a cluster to two ranks that are at different places: all answer, and the run resumes exactly."""

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ask_lightning import KnowledgeBase
from ask_lightning.callbacks import ClusterSignalCallback
from tests.helpers.clients import Pairs, PlainTowers, Watcher, held_out, make_refresh, make_trainer, wrap
from tests.helpers.distributed_run import PairData
from tests.helpers.ranks import on_ranks

EPOCHS, T, STEPS = 4, 2, 6
# Signal, ranks that receive it, and the steps behind which the run goes on.
CASES = {
    "step": (signal.SIGUSR1, (0, 1), 3 * STEPS),
    "one rank": (signal.SIGUSR1, (1,), 3 * STEPS),
    "accumulation": (signal.SIGUSR1, (0, 1), 3 * STEPS),
    "validation": (signal.SIGUSR1, (0, 1), 2 * STEPS),
    "refresh": (signal.SIGUSR1, (0, 1), 2 * STEPS),
    "knowledge": (signal.SIGUSR1, (0, 1), STEPS),
    "end": (signal.SIGTERM, (0, 1), 3 * STEPS),
    "end one rank": (signal.SIGTERM, (1,), 3 * STEPS),
    "end in refresh": (signal.SIGTERM, (0, 1), 2 * STEPS),
}


class Data(PairData):
    def val_dataloader(self):
        return held_out()


class Sender(pl.Callback):
    """Sends a signal from the first rank, while the second waits for it."""

    def __init__(self, case: str | None, folder: Path) -> None:
        self.case, self.folder = case, folder

    def send(self, *cases: str) -> None:
        if self.case not in cases or os.environ["SLURM_PROCID"] != "0":
            return
        number, ranks, _ = CASES[self.case]
        self.case = None
        time.sleep(0.2)  # the other has come to a collective operation
        for rank in ranks:
            os.kill(int((self.folder.parent / f"process-{rank}").read_text()), number)
        time.sleep(0.1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (2, STEPS - 1):
            self.send("step", "one rank", "end", "end one rank")
        if (trainer.current_epoch, batch_idx) == (2, STEPS - 2):  # whose gradients wait for the next ones
            self.send("accumulation")

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 1:
            self.send("validation")


class Source(Pairs):
    """Sends a signal in the second refresh of the first of two ranks."""

    def __init__(self, sender: Sender) -> None:
        super().__init__(48)
        self.sender, self.count = sender, 0

    def __getitem__(self, row):
        self.count += 1
        if self.count == 30:
            self.sender.send("refresh", "end in refresh")
        return super().__getitem__(row)


def fit(folder: Path, case: str | None = None, resume: Path | None = None) -> tuple[list, dict, str]:
    """What a rank saw, the weights, and how the run ended."""
    pl.seed_everything(1, verbose=False)
    model, watcher, sender = PlainTowers(), Watcher(), Sender(case, folder)
    model.validation_step = lambda batch, batch_idx: None
    callbacks = [make_refresh(T, Source(sender)), ClusterSignalCallback(), watcher, sender]
    run = make_trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        devices=2,
        strategy="ddp",
        callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True)],
        enable_checkpointing=True,
        default_root_dir=folder,
        plugins=[SLURMEnvironment()],
    )
    save = KnowledgeBase.save

    def send_and_save(base: KnowledgeBase, path: Path) -> None:
        sender.send("knowledge")
        save(base, path)

    KnowledgeBase.save = send_and_save
    try:
        run.fit(wrap(model, {"gather": True}), datamodule=Data(8), ckpt_path=resume)
        end = "trained"
    except SIGTERMException:
        end = "ended"
    finally:
        KnowledgeBase.save = save
    return list(zip(watcher.losses, watcher.knowledge, strict=True)), model.state_dict(), end


def fit_and_resume(directory: str, commands: str) -> dict:
    rank = os.environ["RANK"]
    names = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_ID": "7", "JOB_NAME": "train", "NODEID": "0"}
    os.environ |= {f"SLURM_{name}": value for name, value in names.items()}
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODELIST": "localhost"}
    os.environ["PATH"] = f"{commands}:{os.environ['PATH']}"
    root = Path(directory)
    (root / f"process-{rank}").write_text(str(os.getpid()))
    results = {"whole": fit(root / "whole")}
    for case, (number, *_) in CASES.items():
        folder = root / case
        stopped = fit(folder, case)
        # As a job that is queued again, Lightning finds the cluster's checkpoint by itself.
        resume = folder / "last.ckpt" if number == signal.SIGTERM else None
        results[case] = stopped, fit(folder, resume=resume)
    return results


@pytest.mark.slow
def test_all_ranks_answer_signals(tmp_path):
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/requeued\n")
    (commands / "scontrol").chmod(0o755)
    for rank in on_ranks(2, fit_and_resume, str(tmp_path), str(commands), grouped=False):
        seen, weights, _ = rank["whole"]
        assert len(seen) == EPOCHS * STEPS
        for case, (number, _, steps) in CASES.items():
            (before, _, end), (after, resumed, _) = rank[case]
            assert end == ("trained" if number == signal.SIGUSR1 else "ended"), case
            assert before == seen[: len(before)], case
            assert after == seen[steps:], case
            assert all(torch.equal(resumed[name], weight) for name, weight in weights.items()), case
    requeued = (tmp_path / "requeued").read_text().splitlines()
    assert requeued == ["requeue 7"] * sum(number == signal.SIGUSR1 for number, *_ in CASES.values())
