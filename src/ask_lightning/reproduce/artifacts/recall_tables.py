"""Tables 1, 2, 4 and 5: test recall by method beside what the paper prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ask_lightning.metrics.table import DIRECTIONS, RECALLS, heading
from ask_lightning.reproduce.artifacts.artifact import SOURCE, Artifact, write_runs, write_table
from ask_lightning.reproduce.published import PublishedRow
from ask_lightning.reproduce.run_table import settings_label
from ask_lightning.reproduce.statistics import paired_difference
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tables import difference_cells, mean_and_deviation
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.text_tables import Cell


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: Name in the table.
        entry: What is trained; None for a line of the paper alone.
        published: What the paper prints; None for a line of ours alone.
    """

    label: str
    entry: Entry | None = None
    published: PublishedRow | None = None


class RecallTable(Artifact):
    """A table of recalls, of differences, and the files of both.

    Args:
        name: Name on the command line and of the files.
        title: What it shows.
        rows: Function from a task to the lines.
        references: Labels of the lines that the others are compared with by paired differences.
        needs_tokens: Whether the task has to have models that compare by tokens.
    """

    def __init__(
        self,
        name: str,
        title: str,
        rows: Callable[[Task], Sequence[Row]],
        *,
        references: Sequence[str],
        needs_tokens: bool = False,
    ) -> None:
        super().__init__(name, title)
        self.rows = rows
        self.references = references
        self.needs_tokens = needs_tokens

    def obstacle(self, task: Task) -> str | None:
        """Why it cannot be made of a task; None: it can.

        Args:
            task: The task.
        """
        if self.needs_tokens and task.make_token_model is None:
            return f"the model of {task.name} is not compared by tokens"
        return None

    def entries(self, task: Task) -> Sequence[Entry]:
        """The entries of its lines.

        Args:
            task: A task without an obstacle.
        """
        return [row.entry for row in self.rows(task) if row.entry is not None]

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the table as Markdown and LaTeX, and the runs as CSV."""
        rows = self.rows(study.task)
        own = {row.label: trained[row.entry.name] for row in rows if row.entry is not None}
        write_runs(folder, self.name, [run for one in own.values() for run in one.runs])
        published = next((row.published for row in rows if row.published is not None), None)
        columns = ["method", "settings", *map(heading, RECALLS), "mean"]
        if published is not None:
            columns += [f"paper, {published.dataset}: {direction.upper()}" for direction in DIRECTIONS]
        parts = [
            write_table(
                folder,
                self.name,
                columns,
                [
                    [
                        row.label,
                        *_own_cells(own.get(row.label)),
                        *(_published_cells(row.published) if published is not None else ()),
                    ]
                    for row in rows
                ],
            )
        ]
        if published is not None:
            parts.append(
                f"Columns of the paper are from {SOURCE}, {self.label}, {published.backbone}: R@1 / R@5 / "
                "R@10. Lines with those alone are systems that are not trained here."
            )
        for reference in self.references:
            if reference in own and len(own) > 1:
                parts.append(_differences(own, reference, folder, self.name))
        return "\n\n".join(parts)


def _own_cells(trained: Trained | None) -> list[Cell]:
    if trained is None:
        return ["", *["–"] * (len(RECALLS) + 1)]
    tests = [run.metrics.test for run in trained.runs]
    cells = [mean_and_deviation([100 * metrics[name] for metrics in tests]) for name in RECALLS]
    return [settings_label(trained.runs[0].settings), *cells, mean_and_deviation(trained.test_recalls)]


def _published_cells(row: PublishedRow | None) -> list[Cell]:
    if row is None:
        return ["–"] * len(DIRECTIONS)
    return [
        " / ".join(f"{row.recalls[name]:.1f}" for name in RECALLS if name.startswith(direction))
        for direction in DIRECTIONS
    ]


def _differences(own: Mapping[str, Trained], reference: str, folder: Path, name: str) -> str:
    """The paired differences to a line, also as LaTeX."""
    base = own[reference].test_recalls
    rows: list[list[Cell]] = []
    for label, trained in own.items():
        if label != reference:
            rows.append([label, *difference_cells(paired_difference(trained.test_recalls, base))])
    columns = ["method", f"mean, minus {reference}", "95 % interval", "p"]
    slug = "".join(character for character in reference if character.isalnum())
    return write_table(folder, f"{name}-minus-{slug}", columns, rows)
