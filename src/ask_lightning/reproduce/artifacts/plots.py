"""What the figures have in common. matplotlib is imported when it is needed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ask_lightning.metrics.table import DIRECTIONS
from ask_lightning.reproduce.study import Trained
from ask_lightning.utilities.optional_imports import import_optional

COLORS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#0891b2", "#7a7a7a")
"""Colors of lines, one after another."""

BASELINE_COLOR = "#7a7a7a"
"""Color of what others are compared with."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure.

    Args:
        width: Width in inches.
        height: Height in inches.

    Raises:
        ImportError: matplotlib is missing, with what to install.
    """
    rc = import_optional("matplotlib").rcParams
    rc["svg.hashsalt"] = "ask-lightning"  # ids in an SVG are random otherwise
    return import_optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def recall_at_1(trained: Trained, direction: str) -> list[float]:
    """R@1 on the test part in percent, seed by seed.

    Args:
        trained: The runs of an entry.
        direction: `"a2t"` or `"t2a"`.
    """
    return [100 * run.metrics.test[f"{direction}/recall_at_1"] for run in trained.runs]


def draw_sweep(
    axes: Sequence[Any],
    values: Sequence[object],
    trained: Sequence[Trained],
    *,
    xlabel: str,
    baselines: Sequence[tuple[str, Trained]] = (),
) -> None:
    """Draw R@1 of both directions against an option: seeds as dots, their means as a line.

    Args:
        axes: Two axes, for audio-to-text and text-to-audio.
        values: Values of the option, one for each entry.
        trained: The runs with each value.
        xlabel: Name of the option.
        baselines: Labelled runs that are drawn as level lines.
    """
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        recalls = [recall_at_1(one, direction) for one in trained]
        for place, seeds in enumerate(recalls):
            axis.scatter([place] * len(seeds), seeds, s=16, color=COLORS[0], alpha=0.4)
        axis.plot([statistics.fmean(seeds) for seeds in recalls], marker="o", color=COLORS[0], label="ASK")
        for number, (label, one) in enumerate(baselines):
            mean = statistics.fmean(recall_at_1(one, direction))
            axis.axhline(mean, color=COLORS[-1 - number], linestyle="--", label=label)
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set(xlabel=xlabel, ylabel="R@1, %", title=direction.upper())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)


def draw_mean_curve(
    axis: Any, curves: Sequence[tuple[Sequence[float], Sequence[float]]], *, color: str, label: str
) -> None:
    """Draw the mean of the seeds' curves, and each curve faintly.

    Args:
        axis: The axis.
        curves: Horizontal and vertical coordinates of each seed; the first are the same for all.
        color: Color of the lines.
        label: Name in the legend.
    """
    for x, y in curves:
        axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    shared = curves[0][0]
    means = [statistics.fmean(values) for values in zip(*(y for _, y in curves), strict=True)]
    axis.plot(shared, means, color=color, label=label)
