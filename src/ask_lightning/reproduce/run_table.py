"""The runs of a comparison in a CSV file, one line each."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ask_lightning.metrics import Calibration
from ask_lightning.metrics.table import RECALLS
from ask_lightning.reproduce.evaluation import Metrics

_PARTS = ("validation", "test", "validation_calibrated", "test_calibrated")
_COLUMNS = (
    "method",
    "settings",
    "seed",
    "stage",
    *(f"{part}/{name}" for part in _PARTS for name in RECALLS),
    "calibration",
    "seconds",
)
_FAILED_COLUMNS = ("method", "settings", "seed", "reason")


class RunsError(ValueError):
    """The runs in a folder cannot be read, or were trained under other options."""


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Attributes:
        method: Name of the method.
        settings: Values of the method's knobs.
        seed: Seed of the weights and the batches.
        stage: `"tune"` if it was among the runs that settings are chosen from, otherwise `"test"`.
        metrics: Metrics of the best epoch.
        seconds: Time that it took.
        folder: Folder of the run's logs and checkpoint.
    """

    method: str
    settings: Mapping[str, Any]
    seed: int
    stage: str
    metrics: Metrics
    seconds: float = field(default=0.0, compare=False)
    folder: Path = field(default=Path(), compare=False)

    def file(self, name: str) -> Path:
        """The path of a file that the run has written.

        Args:
            name: Name of the file in the run's folder.

        Raises:
            RunsError: The file is not there any more.
        """
        path = self.folder / name
        if not path.exists():
            raise RunsError(
                f"{path} is missing, which the run of {self.method} with {settings_label(self.settings)}, "
                f"seed {self.seed}, has written. Put it back, or remove the run's line in runs.csv, and it "
                "is trained again."
            )
        return path


@dataclass(frozen=True)
class FailedRun:
    """A run whose training diverged, among those that settings are chosen from.

    Attributes:
        method: Name of the method.
        settings: Values of the method's knobs.
        seed: Seed of the weights and the batches.
        reason: What ended it.
    """

    method: str
    settings: Mapping[str, Any]
    seed: int
    reason: str


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as JSON in one order.

    Args:
        settings: Values of a method's knobs.

    Examples:
        >>> settings_text({"temperature": 0.1, "T": 5})
        '{"T": 5, "temperature": 0.1}'
    """
    return json.dumps(dict(settings), sort_keys=True)


def settings_label(settings: Mapping[str, Any]) -> str:
    """Settings for a reader, in the order of their names, whether they come from a file or not.

    Args:
        settings: Values of a method's knobs.

    Examples:
        >>> settings_label({"temperature": 0.1, "label_smoothing": 0.3})
        'label_smoothing=0.3, temperature=0.1'
    """
    return ", ".join(f"{name}={settings[name]}" for name in sorted(settings))


def run_folder(output: Path, method: str, settings: Mapping[str, Any], seed: int) -> Path:
    """The folder of a run.

    Args:
        output: Folder of the comparison.
        method: Name of the method.
        settings: Values of the method's knobs.
        seed: Seed of the run.

    Examples:
        >>> run_folder(Path("runs"), "NT-Xent + smoothing", {"temperature": 0.1}, 0).name
        'NT-Xent-smoothing-temperature=0.1-seed=0'
    """
    knobs = "".join(f"-{name}={settings[name]}" for name in sorted(settings))
    return output / re.sub(r"[^\w=.]+", "-", f"{method}{knobs}-seed={seed}")


def _recalls(row: Mapping[str, str], part: str) -> dict[str, float] | None:
    """The recalls of a part of `Metrics` in a line; None where its cells are empty."""
    cells = {name: row[f"{part}/{name}"] for name in RECALLS}
    if not any(cells.values()):
        return None
    recalls = {name: float(cell) for name, cell in cells.items()}
    for name, value in recalls.items():
        if not 0 <= value <= 1:  # nor NaN
            raise ValueError(f"{part}/{name} is {value}, which is no share from 0 to 1")
    return recalls


class RunTable:
    """Finished runs in `runs.csv`, appended one by one, so that a comparison can be continued.

    Cells of calibrated search are empty in the lines of models that have none. Runs that diverged are in
    `failed.csv`, with what ended them.

    Args:
        output: Folder of the comparison; created if it does not exist.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output / "runs.csv"
        self.failed_path = output / "failed.csv"
        output.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[tuple[str, str, int], Run]:
        """The runs so far, by method, settings as JSON, and seed.

        Raises:
            RunsError: The file has other columns or calibrations than this version writes, a line in its
                midst is damaged, or two lines have different results of one run.
        """
        if not self.path.exists():
            return {}
        columns, rows = _read_csv(self.path)
        if columns and columns != _COLUMNS:
            raise RunsError(f"{self.path} has other columns than this version writes. Use another folder.")
        runs: dict[tuple[str, str, int], Run] = {}
        for line, row in rows:
            calibration = self._calibration(row["calibration"])
            with _named(self.path, line):
                settings = json.loads(row["settings"])
                parts: dict[str, Any] = {part: _recalls(row, part) for part in _PARTS}
                if None in (parts["validation"], parts["test"]):  # only calibrated search may be missing
                    raise ValueError("cells of its recalls are empty")
                run = Run(
                    row["method"],
                    settings,
                    int(row["seed"]),
                    row["stage"],
                    Metrics(**parts, calibration=calibration),
                    float(row["seconds"]),
                    run_folder(self.output, row["method"], settings, int(row["seed"])),
                )
            if runs.setdefault((run.method, settings_text(settings), run.seed), run) != run:
                raise RunsError(
                    f"{self.path}, line {line}, has other results of a run than an earlier line. Remove both "
                    "lines, and the run is trained again, or use another folder."
                )
        return runs

    def _calibration(self, text: str) -> Calibration | None:
        """The calibration of a line; None in that of a model with an interaction."""
        if not text:
            return None
        try:
            return Calibration(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise RunsError(
                f"{self.path} holds calibrations of another kind than this version tries ({error}). Use "
                "another folder."
            ) from error

    def read_failed(self) -> dict[tuple[str, str, int], FailedRun]:
        """The runs that diverged so far, by method, settings as JSON, and seed.

        Raises:
            RunsError: A line of the file is damaged.
        """
        if not self.failed_path.exists():
            return {}
        failed = {}
        for line, row in _read_csv(self.failed_path)[1]:
            with _named(self.failed_path, line):
                run = FailedRun(row["method"], json.loads(row["settings"]), int(row["seed"]), row["reason"])
            failed[run.method, settings_text(run.settings), run.seed] = run
        return failed

    def append_failed(self, run: FailedRun) -> None:
        """Add a run that diverged.

        Args:
            run: The run.
        """
        reason = " ".join(run.reason.split())
        _append(
            self.failed_path, _FAILED_COLUMNS, [run.method, settings_text(run.settings), run.seed, reason]
        )

    def append(self, run: Run) -> None:
        """Add a finished run.

        Args:
            run: The run.
        """
        parts = [getattr(run.metrics, part) or dict.fromkeys(RECALLS, "") for part in _PARTS]
        metrics = [part[name] for part in parts for name in RECALLS]
        line = [run.method, settings_text(run.settings), run.seed, run.stage, *metrics]
        calibration = run.metrics.calibration
        line.append("" if calibration is None else json.dumps(calibration.parameters))
        line.append(f"{run.seconds:.1f}")
        _append(self.path, _COLUMNS, line)


@contextmanager
def _named(path: Path, line: int) -> Iterator[None]:
    """Say which line cannot be read."""
    try:
        yield
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise RunsError(
            f"{path}, line {line}, is damaged ({error}). Remove the line, and its run is trained again, or "
            "use another folder."
        ) from error


def _read_csv(path: Path) -> tuple[tuple[str, ...], list[tuple[int, dict[str, str]]]]:
    """The columns of a file, and its rows, each with the number of the line at which it ends.

    Raises:
        RunsError: A line is damaged, so that it is no CSV.
    """
    reader = csv.DictReader(io.StringIO(_whole_lines(path)))
    rows: list[tuple[int, dict[str, str]]] = []
    line = 1
    while True:
        with _named(path, line):
            columns = tuple(reader.fieldnames or ())
            row = next(reader, None)
        if row is None:
            return columns, rows
        line = reader.line_num + 1
        rows.append((reader.line_num, row))


def _whole_lines(path: Path) -> str:
    """The text of a file without a last line that has no end, which is removed from the file.

    A process that was killed while it wrote leaves one.

    Raises:
        RunsError: The text is no UTF-8.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # of bytes, since a character may be torn as well
    if whole != content:
        # Cut off in place: were the file written anew, a kill meanwhile would lose every run.
        os.truncate(path, len(whole))
    try:
        return whole.decode("utf-8")
    except UnicodeDecodeError as error:
        line = whole.count(b"\n", 0, error.start) + 1
        raise RunsError(
            f"{path}, line {line}, is damaged: it is no UTF-8. Remove the line, and its run is trained "
            "again, or use another folder."
        ) from error


def _append(path: Path, columns: Sequence[str], line: Sequence[object]) -> None:
    """Add a line to a CSV file that is on the disk when this returns."""
    is_new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, line] if is_new else [line])
        file.flush()
        os.fsync(file.fileno())
