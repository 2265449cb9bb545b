"""The command in this process or in one of its own, on demo data that are written once for all tests."""

import contextlib
import csv
import io
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

pytest.importorskip("jsonargparse")  # whose extra an environment may lack that tests the core only

from ask_lightning.cli import main, run
from ask_lightning.cli.retrieval_cli import RetrievalCLI
from ask_lightning.losses import RetrievalLoss

ASK = "audiocaps_resnet38_bert_ask"
BASELINE = "audiocaps_resnet38_bert_baseline"


def ask_lightning(*arguments: object) -> RetrievalCLI:
    """A command that succeeds."""
    with contextlib.redirect_stdout(io.StringIO()):
        return run([str(argument) for argument in arguments])


def refusal(capsys, *arguments: object) -> str:
    """The message of a command that fails: one line, no traceback."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main([str(argument) for argument in arguments])
    written = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert code in (1, 2), (code, written)
    (line,) = [line for line in written if line.startswith("ask-lightning: error: ")]
    assert not [line for line in written if "Traceback" in line]
    return line.removeprefix("ask-lightning: error: ")


@contextlib.contextmanager
def started(
    output: Path, *arguments: object, environment: dict[str, str] | None = None
) -> Iterator[multiprocessing.Process]:
    """A command in a process of its own, forked from one that has imported the library: that takes seconds.

    What it prints goes to the file `output`; variables of `environment` are set in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ask_lightning.cli.commands", "tests.helpers.command_line"])
    process = context.Process(
        target=_run_in_process,
        args=(os.getcwd(), output, [str(argument) for argument in arguments], environment or {}),
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run_in_process(folder: str, output: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ |= environment
    # Ctrl-C is ignored where the tests themselves run in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def wait_for(file: Path, process: multiprocessing.Process, seconds: float = 120) -> None:
    """Until a running command has written a file."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert process.is_alive(), "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(folder: Path) -> dict[str, list[float]]:
    """All curves of a run, by name."""
    curves: dict[str, list[float]] = {}
    for table in sorted(folder.glob("logs/version_*/metrics.csv")):
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value:
                        curves.setdefault(name, []).append(float(value))
    return curves


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of the last epoch of a run."""
    return run / "checkpoints" / "last.ckpt"


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table that a run has written."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def log_folder(run: str | Path, version: int = 0) -> Path:
    """Where a run writes its tables, pictures and sounds."""
    return Path(run) / "logs" / f"version_{version}"


class Towers(L.LightningModule):
    """A model that has nothing of this library's."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1000, width)

    def listen(self, batch):
        return normalize(self.table(batch["clip_id"] % 1000), dim=1)

    def read(self, batch):
        return normalize(self.table(batch["clip_id"] % 997), dim=1)

    def training_step(self, batch, batch_idx):
        scores = self.listen(batch) @ self.read(batch).T
        return cross_entropy(scores, torch.arange(len(scores)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestedTowers(Towers):
    """One with a test of its own."""

    __test__ = False

    def test_step(self, batch, batch_idx):
        self.log("width", float(self.listen(batch).shape[1]))


class Distance(RetrievalLoss):
    """A loss of the user's, with an option and without knowledge."""

    needs_knowledge = False

    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.power = power

    def compute(self, audio, text, ids, knowledge):
        loss = (audio - text).norm(dim=1).pow(self.power).mean()
        return loss, {"loss": loss}


class Numbers(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"clip_id": number} for number in range(24)], batch_size=8)
