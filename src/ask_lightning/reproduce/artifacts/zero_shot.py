"""Figure 4: test recall on another domain than that of the training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ask_lightning.metrics.table import DIRECTIONS, RECALLS, mean_recall
from ask_lightning.reproduce.artifacts.artifact import (
    SOURCE,
    Artifact,
    write_figure,
    write_table,
    write_text,
)
from ask_lightning.reproduce.artifacts.entries import ASK, LABEL_SMOOTHING, NT_XENT, TEACHER
from ask_lightning.reproduce.artifacts.plots import COLORS, new_figure
from ask_lightning.reproduce.data_checksum import data_checksum
from ask_lightning.reproduce.statistics import paired_difference
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tables import difference_cells, mean_and_deviation
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.reproduce.training import recalls_elsewhere
from ask_lightning.utilities.text_tables import Cell

_ENTRIES = (NT_XENT, LABEL_SMOOTHING, ASK, TEACHER)


class TransferFigure(Artifact):
    """Figure 4: zero-shot transfer."""

    def __init__(self) -> None:
        super().__init__("figure4", "zero-shot transfer to another domain")

    def obstacle(self, task: Task) -> str | None:
        """Why it cannot be made of a task; None: it can.

        Args:
            task: The task.
        """
        return None if task.transfer else f"{task.name} has no other domain to test on"

    def entries(self, task: Task) -> Sequence[Entry]:
        """NT-Xent, ASK, and what goes beyond the paper.

        Args:
            task: A task with another domain.
        """
        return _ENTRIES

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Test the kept epochs on the other domains; write the figure and its table."""
        domains = study.task.transfer
        figure = new_figure(5.2 * len(domains), 3.8)
        rows: list[list[Cell]] = []
        for axis, domain in zip(figure.subplots(1, len(domains), squeeze=False)[0], domains, strict=True):
            recalls = {entry.name: _recalls(study, trained[entry.name], domain) for entry in _ENTRIES}
            base = [100 * mean_recall(one) for one in recalls[NT_XENT.name]]
            for place, (name, by_seed) in enumerate(recalls.items()):
                means = [100 * mean_recall(one) for one in by_seed]
                cells = [
                    mean_and_deviation([100 * one[f"{direction}/recall_at_1"] for one in by_seed])
                    for direction in DIRECTIONS
                ]
                difference = difference_cells(paired_difference(means, base))
                rows.append([domain, name, *cells, mean_and_deviation(means), *difference])
                for number, direction in enumerate(DIRECTIONS):
                    values = [100 * one[f"{direction}/recall_at_1"] for one in by_seed]
                    x = place + 0.36 * (number - 0.5)
                    label = None if place else f"{direction.upper()} R@1"
                    axis.bar(x, statistics.fmean(values), 0.34, color=COLORS[number], alpha=0.5, label=label)
                    axis.scatter([x] * len(values), values, s=12, color=COLORS[number])
            axis.set_xticks(range(len(recalls)), list(recalls), fontsize=8)
            axis.set(title=f"{study.task.name} → {domain}, zero-shot", ylabel="R@1, %")
            axis.grid(axis="y", alpha=0.3)
            axis.legend(fontsize=8)
        write_figure(folder, self.name, figure)
        columns = ["tested on", "method", *(f"{direction.upper()} R@1" for direction in DIRECTIONS)]
        columns += ["mean", "minus NT-Xent", "95 % interval", "p"]
        note = f"In {SOURCE}, A2T R@1 gains 1.3 at best from AudioCaps to Clotho, and 2.6 on the way back."
        return f"{write_table(folder, self.name, columns, rows)}\n\n{note}"


def _recalls(study: Study, trained: Trained, domain: str) -> list[dict[str, float]]:
    """Recalls of each seed on another domain, kept in a file beside the run, one for each test part."""
    found = []
    for run in trained.runs:
        data = study.task.transfer[domain](run.seed)
        checksum = data_checksum({"test": data.datasets["test"]})
        kept = run.folder / f"transfer-{domain}-{checksum}.json"
        if not kept.exists():
            recalls = recalls_elsewhere(
                partial(trained.method.build, run.settings),
                data,
                folder=run.file("best.ckpt").parent,
                accelerator=study.task.accelerator,
            )
            write_text(kept, json.dumps(recalls) + "\n")
        stored = json.loads(kept.read_text(encoding="utf-8"))
        found.append({name: float(stored[name]) for name in RECALLS})
    return found
