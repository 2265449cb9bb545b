"""One thread, no network, no chatter: before torch and Lightning are imported by a test."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import lightning.pytorch  # noqa: F401 - it sets its loggers up when it is imported
import pytest
import torch

torch.set_num_threads(1)

_CHATTER = (
    "ignore:The dirpath has changed from",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:You passed in a `val_dataloader` but have no `validation_step`",
    "ignore:Found .* in eval mode at the start of training",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:.*does not have many workers",
    "ignore:.*The number of training batches",
    "ignore:.*ModelSummary",
    "ignore:.*GPU available but not used",
    "ignore:.*builds the knowledge once and never renews it",
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for line in _CHATTER:
        config.addinivalue_line("filterwarnings", line)
