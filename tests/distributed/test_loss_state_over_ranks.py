"""Runs of losses with a queue on two ranks: against one process, and resumed."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ask_lightning import ASKModule
from ask_lightning.losses import (
    CrossBatchMemoryLoss,
    MomentumContrastLoss,
    NearestNeighborContrastiveLoss,
)
from tests.helpers.clients import PlainTowers, Watcher, make_trainer
from tests.helpers.distributed_run import PairData
from tests.helpers.ranks import on_ranks

# Whole batches fit, as each rank has every other pair of one: their order in the queue is another one.
LOSSES = {
    "momentum": lambda gather: MomentumContrastLoss(0.2, 32, momentum=0.8, gather=gather),
    "memory": lambda gather: CrossBatchMemoryLoss(0.2, 32, start_step=2, gather=gather),
    "neighbors": lambda gather: NearestNeighborContrastiveLoss(0.2, 24, gather=gather),
}
STEPS = 6


def fit(
    size: int, name: str, gather: bool, epochs: int, directory=None, resume=None, precision="32-true"
) -> dict:
    pl.seed_everything(1, verbose=False)
    watcher = Watcher()
    keep = [ModelCheckpoint(directory, save_last=True)] if directory else []
    run = make_trainer(
        max_epochs=epochs,
        devices=size,
        strategy="ddp" if size > 1 else "auto",
        precision=precision,
        callbacks=[watcher, *keep],
        enable_checkpointing=bool(keep),
    )
    module = ASKModule(PlainTowers(), LOSSES[name](gather), ids="clip_id")
    run.fit(module, datamodule=PairData(8), ckpt_path=resume)
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    return {"losses": watcher.losses, "weights": weights, "state": module.loss.training_state()}


def fit_all(size: int) -> dict:
    return {name: fit(size, name, True, 2, precision="64-true") for name in LOSSES}


def test_two_ranks_train_as_one_process():
    alone = fit_all(1)
    for rank in on_ranks(2, fit_all, 2, grouped=False):
        for name, whole in alone.items():
            torch.testing.assert_close(rank[name]["losses"], whole["losses"], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(rank[name]["weights"], whole["weights"], rtol=1e-8, atol=1e-10)
            ours, theirs = (run["state"]["queue"]["ids"].sort().values for run in (rank[name], whole))
            assert torch.equal(ours, theirs)


def fit_and_resume(directory: str, gather: bool) -> dict:
    """A whole run, and one that is resumed after its first epoch."""
    runs = {}
    for name in LOSSES:
        folder = Path(directory) / name
        whole = fit(2, name, gather, 2)
        fit(2, name, gather, 1, folder)
        runs[name] = whole, fit(2, name, gather, 2, resume=folder / "last.ckpt")
    return runs


@pytest.mark.parametrize("gather", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumed_on_two_ranks(gather, tmp_path):
    for rank in on_ranks(2, fit_and_resume, str(tmp_path), gather, grouped=False):
        for whole, resumed in rank.values():
            assert resumed["losses"] == whole["losses"][STEPS:]
            for key, value in whole["weights"].items():
                assert torch.equal(resumed["weights"][key], value)
            assert torch.equal(resumed["state"]["queue"]["ids"], whole["state"]["queue"]["ids"])
