"""The figure of a comparison: test recall by method, validation recall and drift over training."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.comparison import Comparison
from ask_lightning.reproduce.run_table import Run
from ask_lightning.utilities.optional_imports import import_optional

_COLORS = ("#7a7a7a", "#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#b45309")


def comparison_picture(comparison: Comparison, path: Path, *, refresh_every: int) -> None:
    """Draw what the methods reached on the test part, and how they came there.

    The left panel has the mean of the six test recalls: a dot for each seed and a line at their mean,
    hollow for search by cosine similarity, or by a model's interaction, and filled for calibrated search. The
    others have the mean validation recall and the representation drift over the epochs, averaged over the
    seeds, for the settings chosen for search by cosine similarity; methods that log no drift have none.

    Args:
        comparison: What `compare` returned, with runs whose folders hold the `metrics.csv` of Lightning's
            CSVLogger.
        path: Path of the PNG file to write.
        refresh_every: Number of epochs T between refreshes, which are marked.

    Raises:
        ImportError: matplotlib is missing, with what to install.
    """
    figure = import_optional("matplotlib.figure").Figure(figsize=(13, 4), layout="constrained")
    recall, learning, drift = figure.subplots(1, 3)
    methods = list(dict.fromkeys(run.method for run in comparison.raw))
    colors = {method: _COLORS[number % len(_COLORS)] for number, method in enumerate(methods)}
    for place, method in enumerate(methods):
        for runs, part, shift, filled in (
            (comparison.raw, "test", -0.15, False),
            (comparison.calibrated, "test_calibrated", 0.15, True),
        ):
            values = [100 * mean_recall(getattr(run.metrics, part)) for run in runs if run.method == method]
            if values:
                _dots(recall, place + shift, values, colors[method], filled=filled)
        own = [run for run in comparison.raw if run.method == method]
        for axis, names, scale in (
            (learning, ("val/mean_recall",), 100),
            (drift, ("ask/probe_rdm_audio", "ask/probe_rdm_text"), 1),
        ):
            epochs, curve = _mean_curve(own, names)
            if epochs:
                axis.plot(epochs, [scale * value for value in curve], color=colors[method], label=method)
    last = max(tick for axis in (learning, drift) for tick in axis.get_xlim())
    for number, epoch in enumerate(range(0, int(last) + 1, refresh_every)):
        for axis in (learning, drift):
            label = "" if number else "refresh of the knowledge"
            axis.axvline(epoch - 0.5, color="black", linestyle=":", linewidth=1, label=label)
    recall.margins(y=0.15)  # room for the numbers
    recall.set_xticks(range(len(methods)), [method.replace(", ", ",\n") for method in methods], fontsize=8)
    recall.set(
        title="test: mean of R@1, R@5, R@10\n(hollow: by cosine, filled: calibrated search)", ylabel="%"
    )
    learning.set(title="validation during training, by cosine", ylabel="mean recall, %", xlabel="epoch")
    drift.set(title="representation drift (RDM) since the refresh", ylabel="nats", xlabel="epoch")
    for axis in (recall, learning, drift):
        axis.grid(alpha=0.3)
    learning.legend(fontsize=8)
    drift.set_ylim(0, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _dots(axis: Any, place: float, values: Sequence[float], color: str, *, filled: bool) -> None:
    """Values as dots above a place of the horizontal axis, and a line at their mean."""
    face = color if filled else "none"
    axis.scatter([place] * len(values), values, s=28, facecolors=face, edgecolors=color, alpha=0.8)
    mean = statistics.fmean(values)
    axis.hlines(mean, place - 0.12, place + 0.12, colors=color, linewidth=2)
    axis.annotate(
        f"{mean:.1f}", (place, max(values)), (0, 5), textcoords="offset points", ha="center", fontsize=8
    )


def _mean_curve(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[int], list[float]]:
    """The mean over runs and columns of what each epoch logged; epochs that some run lacks are left out."""
    tables = [
        dict(zip(*read_column(run.file("metrics.csv"), name), strict=True)) for run in runs for name in names
    ]
    epochs = sorted(set.intersection(*map(set, tables)))
    return epochs, [statistics.fmean(table[epoch] for table in tables) for epoch in epochs]


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
