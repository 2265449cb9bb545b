"""The command in this process, on demo data that are written once for all tests."""

import contextlib
import csv
import io
import warnings
from pathlib import Path

from ask_lightning.cli import main, run
from ask_lightning.cli.training import RetrievalCLI

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
