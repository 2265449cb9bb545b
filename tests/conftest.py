"""One thread, no network, no chatter: before torch and Lightning are imported by a test.

Fixtures that several rooms use are here, those of one room in its own `conftest.py`; classes and functions
that tests share are imported from `tests.helpers`.
"""

import logging
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
# Tables that the `datasets` library copies go where the tests' other files go.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
# For this process, before torch is imported, and for those that tests start: one thread rounds otherwise than
# two, and tests that run side by side share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import lightning.pytorch  # noqa: F401 - it sets its loggers up when it is imported
import pytest
import torch
from torch.utils.data import DataLoader

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


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag of the command line with a folder of synthetic datasets, written once."""
    from ask_lightning.cli.demo_data import write_demo_data  # needs packages that the core does not

    return f"--demo={write_demo_data(tmp_path_factory.mktemp('demo'))}"


@pytest.fixture(scope="session")
def trained(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with ASK, which tests read and leave as it is."""
    from tests.helpers.command_line import ASK, ask_lightning

    run = tmp_path_factory.mktemp("trained") / "run"
    ask_lightning("fit", "--config", ASK, demo, "--run", run)
    return run


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    """Lightning writes below the working directory unless it is told otherwise."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _dataloader_as_it_was():
    """Lightning patches DataLoader while it calls loader hooks, and leaves it patched if one raises."""
    names = [f"__{verb}__" for verb in ("init", "setattr", "delattr")]
    names += [f"__old{name}" for name in names]
    before = {name: vars(DataLoader)[name] for name in names if name in vars(DataLoader)}
    yield
    for name in names:
        if name in before:
            setattr(DataLoader, name, before[name])
        elif name in vars(DataLoader):
            delattr(DataLoader, name)
