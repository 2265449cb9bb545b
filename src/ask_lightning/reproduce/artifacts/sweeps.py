"""Figures 5 and 7: R@1 against T, K and ρ, with the other settings as they were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ask_lightning.metrics.table import DIRECTIONS
from ask_lightning.reproduce.artifacts.artifact import (
    SOURCE,
    Artifact,
    write_figure,
    write_runs,
    write_table,
)
from ask_lightning.reproduce.artifacts.entries import ASK, NT_XENT, ask
from ask_lightning.reproduce.artifacts.paper_tables import STATIC
from ask_lightning.reproduce.artifacts.plots import draw_sweep, new_figure, recall_at_1
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tables import mean_and_deviation
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.text_tables import Cell

_PAPER_EPOCHS = 50
_PAPER_PERIODS = (5, 15, 30)
_NUM_NEIGHBORS = (5, 10, 15, 20, 25, 30)
_INJECTION_RATIOS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35)


class RefreshSweep(Artifact):
    """Figure 5: how often the knowledge is renewed.

    The paper's T of 5, 15 and 30 are taken as shares of its 50 epochs, and the task's own T is added.
    """

    def __init__(self) -> None:
        super().__init__("figure5", "R@1 against the number of epochs T from one refresh to the next")

    def entries(self, task: Task) -> Sequence[Entry]:
        """NT-Xent, ASK, and ASK with each other T.

        Args:
            task: The task.
        """
        return [NT_XENT, *entries_by_period(task).values()]

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the figure, its table and the runs."""
        by_period = {period: trained[entry.name] for period, entry in entries_by_period(study.task).items()}
        figure = new_figure(9, 3.6)
        draw_sweep(
            figure.subplots(1, 2),
            list(by_period),
            list(by_period.values()),
            xlabel="T, epochs",
            baselines=[("NT-Xent", trained[NT_XENT.name])],
        )
        rows = _rows([("NT-Xent", trained[NT_XENT.name]), *(("T", *pair) for pair in by_period.items())])
        note = f"In {SOURCE}, T = 15 of 50 epochs is best, static knowledge worst of ASK's."
        return _finish(self, folder, figure, rows, note, [trained[NT_XENT.name], *by_period.values()])


class OptionSweep(Artifact):
    """Figure 7: the number of neighbours K, and the injection ratio ρ."""

    def __init__(self) -> None:
        super().__init__("figure7", "R@1 against the number of neighbours K and the injection ratio ρ")

    def obstacle(self, task: Task) -> str | None:
        """Why it cannot be made of a task; None: it can.

        Args:
            task: The task, whose training part is read.
        """
        train: Any = task.make_data(0).datasets["train"]
        largest = max(_NUM_NEIGHBORS)
        if len(train) >= largest:
            return None
        return f"{task.name} has {len(train)} training pairs, fewer than the largest K, {largest}"

    def entries(self, task: Task) -> Sequence[Entry]:
        """ASK, and ASK with each other K and ρ.

        Args:
            task: The task.
        """
        return [*_by_num_neighbors().values(), *_by_ratio().values()]

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the figure, its table and the runs."""
        figure = new_figure(9, 6.8)
        axes = figure.subplots(2, 2)
        rows: list[list[Cell]] = []
        shown = []
        for own_axes, label, symbol, by_value in (
            (axes[0], "number of neighbours K", "K", _by_num_neighbors()),
            (axes[1], "injection ratio ρ", "ρ", _by_ratio()),
        ):
            found = {value: trained[entry.name] for value, entry in by_value.items()}
            draw_sweep(own_axes, list(found), list(found.values()), xlabel=label)
            rows += _rows([(symbol, *pair) for pair in found.items()])
            shown += list(found.values())
        note = f"In {SOURCE}, K = 10 and ρ = 0.2 are best."
        return _finish(self, folder, figure, rows, note, shown)


def periods(task: Task) -> tuple[int, ...]:
    """The numbers of epochs T that a task is trained with, all below its number of epochs.

    Args:
        task: The task.
    """
    scaled = {max(1, round(period * task.max_epochs / _PAPER_EPOCHS)) for period in _PAPER_PERIODS}
    return tuple(sorted(T for T in scaled | {int(task.refresh["T"])} if task.max_epochs > T))


def entries_by_period(task: Task) -> dict[object, Entry]:
    """The entries by T, static knowledge first.

    Args:
        task: The task.
    """
    by_period: dict[object, Entry] = {"static": ask("T=static", refresh={"T": STATIC}, like=ASK)}
    for T in periods(task):
        is_own = task.refresh["T"] == T
        by_period[T] = ASK if is_own else ask(f"T={T}", refresh={"T": T}, like=ASK)
    return by_period


def _by_num_neighbors() -> dict[object, Entry]:
    return {k: ASK if k == 10 else ask(f"K={k}", like=ASK, num_neighbors=k) for k in _NUM_NEIGHBORS}


def _by_ratio() -> dict[object, Entry]:
    return {
        ratio: ASK if ratio == 0.2 else ask(f"ρ={ratio}", like=ASK, injection_ratio=ratio)
        for ratio in _INJECTION_RATIOS
    }


def _rows(found: Sequence[tuple[object, ...]]) -> list[list[Cell]]:
    """Cells of labelled runs: `(label, runs)` or `(symbol, value, runs)`."""
    rows: list[list[Cell]] = []
    for *label, trained in found:
        assert isinstance(trained, Trained)
        recalls = [mean_and_deviation(recall_at_1(trained, direction)) for direction in DIRECTIONS]
        rows.append([" = ".join(map(str, label)), *recalls])
    return rows


def _finish(
    artifact: Artifact,
    folder: Path,
    figure: object,
    rows: Sequence[Sequence[Cell]],
    note: str,
    shown: Sequence[Trained],
) -> str:
    """Write the files of a sweep; the text is its table."""
    write_figure(folder, artifact.name, figure)
    write_runs(folder, artifact.name, [run for trained in shown for run in trained.runs])
    columns = ["ASK with", *(f"{direction.upper()} R@1" for direction in DIRECTIONS)]
    return f"{write_table(folder, artifact.name, columns, rows)}\n\n{note}"
