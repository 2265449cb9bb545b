"""What a table or a figure of the paper consists of, and the files that it is written to."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ask_lightning.metrics.table import RECALLS
from ask_lightning.reproduce.run_table import Run, settings_text
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.text_tables import Cell, csv_table, latex_table, markdown_table

SOURCE = "ASK, arXiv 2512.19703 version 2"
"""Where published numbers come from."""


class Artifact(ABC):
    """A table or a figure that a study makes.

    Args:
        name: Name on the command line and of the files, such as `"table2"`.
        title: What it shows, in a line.
    """

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.title = title

    @property
    def label(self) -> str:
        """The name as a reader sees it, such as `"Table 2"`."""
        return re.sub(r"(\d+)$", r" \1", self.name).capitalize()

    def obstacle(self, task: Task) -> str | None:
        """Why it cannot be made of a task; None: it can.

        Args:
            task: The task.
        """
        return None

    @abstractmethod
    def entries(self, task: Task) -> Sequence[Entry]:
        """The entries that it needs.

        Args:
            task: A task without an obstacle.
        """

    def write(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write its files.

        Args:
            study: The study whose runs it shows.
            trained: Its entries after training, and others, by name.
            folder: Folder of the files.

        Returns:
            What it has to say, in Markdown, which is in `{name}.md` too.
        """
        text = self._make(study, trained, folder)
        write_text(folder / f"{self.name}.md", f"# {self.label}: {self.title}\n\n{text}\n")
        return text

    @abstractmethod
    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write figures, tables in LaTeX and runs; the text is what `write` returns."""


def write_table(folder: Path, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Write a table as LaTeX.

    Args:
        folder: Folder of the file.
        name: Name of the file without its ending.
        columns: Headings.
        rows: Rows of as many cells.

    Returns:
        The table in Markdown.
    """
    write_text(folder / f"{name}.tex", latex_table(columns, rows) + "\n")
    return markdown_table(columns, rows)


def write_runs(folder: Path, name: str, runs: Sequence[Run]) -> None:
    """Write every run to a CSV file, with recalls as fractions.

    Args:
        folder: Folder of the file.
        name: Name of the file without its ending.
        runs: The runs.
    """
    columns = ["method", "settings", "seed", *(f"validation/{name}" for name in RECALLS)]
    columns += [*(f"test/{name}" for name in RECALLS), "seconds"]
    rows: list[list[Cell]] = [
        [
            run.method,
            settings_text(run.settings),
            run.seed,
            *(run.metrics.validation[name] for name in RECALLS),
            *(run.metrics.test[name] for name in RECALLS),
            round(run.seconds, 1),
        ]
        for run in runs
    ]
    write_text(folder / f"{name}.csv", csv_table(columns, rows))


def write_figure(folder: Path, name: str, figure: Any) -> None:
    """Write a figure as PNG and as SVG.

    Args:
        folder: Folder of the files.
        name: Name of the files without their endings.
        figure: A matplotlib figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    # Without a date and with fixed ids, the same figure is the same file.
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Args:
        path: Path of the file; its folder is made.
        text: The text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
