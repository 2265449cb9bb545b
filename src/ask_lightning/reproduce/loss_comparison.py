"""Losses compared on a task, from the first run to the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.loggers import Logger

from ask_lightning.reproduce.comparison import compare
from ask_lightning.reproduce.methods import LOSSES, MAIN_LOSSES, MAX_CANDIDATES, loss_methods
from ask_lightning.reproduce.report import write_report
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.arguments import check_choice


def compare_losses(
    task: Task,
    names: Sequence[str],
    output: Path,
    *,
    references: Sequence[str] = MAIN_LOSSES[:2],
    num_candidates: int = MAX_CANDIDATES,
    seeds: Sequence[int] = range(5),
    jobs: int = 1,
    threads: int = 1,
    make_loggers: Callable[[str], Sequence[Logger]] | None = None,
    log: Callable[[str], object] = print,
) -> str:
    """Train the model of a task with one loss after another, and write tables and picture.

    A repeated call continues where the last one stopped; see `compare`.

    Args:
        task: Task that the losses share.
        names: Names of the losses, keys of `LOSSES`.
        output: Folder of runs, logs, checkpoints and the report.
        references: Names of the losses that the others are compared with by paired differences. Those that
            are not among `names` are left out.
        num_candidates: Number of settings that each loss tries, in [1, 8].
        seeds: Seeds of the runs; settings are chosen on the first.
        jobs: Number of runs at a time.
        threads: Number of CPU threads of each run, and of what the task prepares.
        make_loggers: Function from the name of a run to loggers besides the CSV logger, or None.
        log: Function that is called with a line about each finished run.

    Returns:
        The tables in Markdown; see `write_report`.

    Raises:
        ValueError: A loss is unknown, an argument is outside its range, or the folder holds runs under
            another protocol.
        RuntimeError: A run failed. Runs that are finished are not repeated by the next call.
        ImportError: matplotlib is missing, with what to install; the tables are written.
    """
    for name in names:
        check_choice("names", name, tuple(LOSSES))
    methods = loss_methods(
        {name: LOSSES[name] for name in names},
        task.make_model,
        learning_rate=task.learning_rate,
        num_candidates=num_candidates,
        refresh=task.refresh,
    )
    task.prepare_runs(threads, log)
    compared = compare(
        methods,
        replace(task.protocol(), make_loggers=make_loggers),
        output,
        seeds=seeds,
        jobs=jobs,
        threads=threads,
        log=log,
    )
    shown = [name for name in references if name in names]
    return write_report(compared, output, references=shown, refresh_every=task.refresh["T"])
