"""Figure 3: R@1 of models that compare by tokens, with and without ASK."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ask_lightning.metrics.table import DIRECTIONS
from ask_lightning.reproduce.artifacts.artifact import SOURCE, Artifact, write_figure, write_runs
from ask_lightning.reproduce.artifacts.paper_tables import TABLE4
from ask_lightning.reproduce.artifacts.plots import BASELINE_COLOR, COLORS, new_figure, recall_at_1
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tasks.task import Task


class TokenBars(Artifact):
    """Figure 3, of the runs of Table 4."""

    def __init__(self) -> None:
        super().__init__("figure3", "R@1 of models that compare by tokens, with and without ASK")

    def obstacle(self, task: Task) -> str | None:
        """Why it cannot be made of a task; None: it can.

        Args:
            task: The task.
        """
        return TABLE4.obstacle(task)

    def entries(self, task: Task) -> Sequence[Entry]:
        """Those of Table 4.

        Args:
            task: A task with models of tokens.
        """
        return TABLE4.entries(task)

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the figure and the runs."""
        rows = [row for row in TABLE4.rows(study.task) if row.entry is not None]
        figure = new_figure(12, 4.6)
        for axis, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
            for place, row in enumerate(rows):
                assert row.entry is not None
                recalls = recall_at_1(trained[row.entry.name], direction)
                color = BASELINE_COLOR if row.label in TABLE4.references else COLORS[0]
                axis.bar(place, statistics.fmean(recalls), color=color, alpha=0.5)
                axis.scatter([place] * len(recalls), recalls, s=14, color=color)
                if row.published is not None:
                    axis.scatter(place, row.published.recalls[f"{direction}/recall_at_1"], **_PAPER)
            labels = [row.label.replace(", knowledge: ", "\n") for row in rows]
            axis.set_xticks(range(len(rows)), labels, fontsize=7, rotation=30, ha="right")
            axis.scatter([], [], label="paper, other data and models", **_PAPER)
            axis.set(title=direction.upper(), ylabel="R@1, %")
            axis.legend(fontsize=8)
            axis.grid(axis="y", alpha=0.3)
        write_figure(folder, self.name, figure)
        write_runs(folder, self.name, [run for row in rows for run in trained[_name(row.entry)].runs])
        return f"R@1 of Table 4: bars are means over seeds, dots are seeds, crosses are those of {SOURCE}."


_PAPER = {"marker": "x", "s": 30, "color": "black"}


def _name(entry: Entry | None) -> str:
    assert entry is not None
    return entry.name
