"""The figure of a comparison: recall, drift and reliability over training."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ask_lightning.reproduce.run_table import Run
from ask_lightning.utilities.optional_imports import import_optional

_COLORS = ("#7a7a7a", "#c2410c", "#1d4ed8", "#15803d")


def training_picture(runs: Sequence[Run], path: Path, *, refresh_every: int) -> None:
    """Draw validation recall, representation drift and the reliability factor over epochs.

    The first run of each method is drawn, with drift and reliability if the method logs them.

    Args:
        runs: Runs whose folders hold the `metrics.csv` of Lightning's CSVLogger.
        path: Path of the PNG file to write.
        refresh_every: Number of epochs T between refreshes, which are marked.

    Raises:
        ImportError: matplotlib is missing, with what to install.
    """
    figure = import_optional("matplotlib.figure").Figure(figsize=(12, 3.6), layout="constrained")
    recall, drift, factor = figure.subplots(1, 3)
    first = {run.method: run for run in reversed(runs)}
    for (method, run), color in zip(reversed(first.items()), _COLORS, strict=False):
        table = run.folder / "metrics.csv"
        for direction, line in (("a2t", "-"), ("t2a", "--")):
            epochs, values = read_column(table, f"val/{direction}/recall_at_10")
            label = f"{method}, {direction.upper()}"
            recall.plot(epochs, [100 * value for value in values], line, color=color, label=label)
        for side, line in (("audio", "-"), ("text", "--")):
            epochs, values = read_column(table, f"ask/probe_rdm_{side}")
            if epochs:
                drift.plot(
                    epochs, values, line, color=color, marker="o", markersize=3, label=f"{method}, {side}"
                )
        for direction, line in (("a2t", "-"), ("t2a", "--")):
            epochs, values = read_column(table, f"ask/factor_{direction}")
            if epochs:
                factor.plot(epochs, values, line, color=color, label=f"{method}, {direction.upper()}")
    last = max((tick for axis in (recall, drift) for tick in axis.get_xlim()), default=0)
    for number, epoch in enumerate(range(0, int(last) + 1, refresh_every)):
        drift.axvline(
            epoch - 0.5, color="black", linestyle=":", linewidth=1, label="" if number else "refresh"
        )
    recall.set(title="validation R@10", ylabel="%")
    drift.set(title="representation drift (RDM) at the end of the epoch", ylabel="nats", ylim=(0, None))
    factor.set(title="reliability factor of the loss")
    for axis in (recall, drift, factor):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def read_column(table: Path, name: str) -> tuple[list[int], list[float]]:
    """Read a metric by epoch from the file of Lightning's CSVLogger; steps of an epoch are averaged.

    Args:
        table: Path of the `metrics.csv`.
        name: Name of the column.

    Returns:
        Epochs and values, both empty if the metric was never logged.
    """
    by_epoch: dict[int, list[float]] = {}
    with open(table, newline="") as lines:
        for row in csv.DictReader(lines):
            if row.get(name) and row.get("epoch"):
                by_epoch.setdefault(int(row["epoch"]), []).append(float(row[name]))
    return list(by_epoch), [sum(values) / len(values) for values in by_epoch.values()]
