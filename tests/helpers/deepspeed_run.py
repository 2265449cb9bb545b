"""Runs by DeepSpeed and the same by DDP, many in one process, which imports DeepSpeed for seconds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict
from torch import nn
from torch.utils.data import DataLoader

from ask_lightning.callbacks import LoaderStateCallback
from ask_lightning.losses import MomentumContrastLoss
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.sharded_run import CriterionTowers, FlatTowers, ValidatedPairs, fit, tau

STAGES = ("deepspeed_0", "deepspeed_1", "deepspeed_2")


class FlatCriterionTowers(CriterionTowers):
    """DeepSpeed takes no parameters without an axis."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.log_temperature = nn.Parameter(torch.tensor([-2.0]))


class IdleTowers(FlatTowers):
    """With a layer that no loss sees."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.head = nn.Linear(2, 2)


class StatefulPairs(ValidatedPairs):
    """By a loader that can be put back to its place inside an epoch."""

    def train_dataloader(self) -> DataLoader:
        from torchdata.stateful_dataloader import StatefulDataLoader

        plain = super().train_dataloader()
        return StatefulDataLoader(plain.dataset, plain.batch_size, sampler=plain.sampler, drop_last=True)


def contrast_by_momentum() -> MomentumContrastLoss:
    return MomentumContrastLoss(queue_size=16, temperature=tau, momentum=0.9, gather=True)


# What a run is of, beside the strategy.
VARIANTS = {
    "plain": {},
    "encode": {"options": {"step": "encode"}},
    "criterion": {"client": FlatCriterionTowers, "options": {"criterion": "criterion"}},
    "local": {"loss": {"gather": False}},
    "chunks": {"options": {"chunk_size": 2}},
    "background": {"in_background": True, "T": 1},
    "sharded": {"placement": "sharded"},
    "write_back": {"write_back": True, "source": None, "options": {"ids": "clip_id"}},
    "momentum": {"loss": contrast_by_momentum, "options": {"ids": "clip_id"}},
}


def fit_variant(kind: str, name: str) -> dict:
    settings = {"client": FlatTowers} | VARIANTS[name]
    if isinstance(loss := settings.get("loss"), Callable):
        settings["loss"] = loss()
    return with_warnings(kind, **settings)


def with_warnings(kind: str, directory: Path | None = None, **settings) -> dict:
    """A run, with what it warned of that is about gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(kind, 2, directory, **settings)
    return run | {"warned": [text for one in caught if "got no gradient" in (text := str(one.message))]}


def saved_and_resumed(kind: str, directory: str) -> dict:
    """A run, one that goes on from inside its second epoch, and one from the end of its first."""
    folder = Path(directory)
    stateful = {"client": FlatTowers, "data": StatefulPairs}
    within = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = fit(kind, 2, folder / "whole", extra=(LoaderStateCallback(), within), **stateful)
    resume = folder / "step=4.ckpt"
    inside = fit(kind, 2, folder / "inside", resume=resume, extra=(LoaderStateCallback(),), **stateful)
    fit(kind, 2, folder / "first", client=FlatTowers, epochs=1)
    between = fit(kind, 2, folder / "between", client=FlatTowers, resume=folder / "first" / "last.ckpt")
    if kind != "deepspeed_0" and Ranks.current().rank == 0:  # there is no optimiser in parts
        last = folder / "whole" / "last.ckpt"
        convert_zero_checkpoint_to_fp32_state_dict(last, folder / "converted.ckpt")
    return {"whole": whole, "inside": inside, "between": between}


def all_stages() -> dict:
    """The same run by each strategy, and what is said of parameters without a gradient."""
    idle = {kind: with_warnings(kind, client=IdleTowers, epochs=1)["warned"] for kind in STAGES}
    return {kind: fit_variant(kind, "plain") for kind in ("ddp", *STAGES)} | {"idle": idle}


def all_variants() -> dict:
    """Each variant by stage 2 and by DDP."""
    return {
        name: {kind: fit_variant(kind, name) for kind in ("ddp", "deepspeed_2")}
        for name in VARIANTS
        if name != "plain"
    }
