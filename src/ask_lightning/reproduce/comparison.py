"""Methods compared under one protocol: the same number of tuning runs and the same seeds for all."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from ask_lightning.data import RetrievalDataModule
from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.run_table import (
    FailedRun,
    Run,
    RunsError,
    RunTable,
    run_folder,
    settings_label,
    settings_text,
)
from ask_lightning.reproduce.training import ModuleAndCallbacks, silence_lightning, train_and_evaluate
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.non_finite import NonFiniteEmbeddingsError

Settings = Mapping[str, Any]

_METHODS = "methods"  # the entry of `protocol.json` with the options of each method


@dataclass(frozen=True)
class Method:
    """A way to train, and the settings that it is tried with.

    Attributes:
        name: Name in tables.
        candidates: Settings to choose from, each with values that JSON can hold.
        build: Function from settings to a module and its callbacks. Worker processes get it by pickling, so
            that it has to be a function of a module, or a `functools.partial` of one.
        description: Further options that decide results, alike in all candidates, with values that JSON can
            hold. A comparison is continued only with the same ones.
    """

    name: str
    candidates: tuple[Settings, ...]
    build: Callable[[Settings], ModuleAndCallbacks]
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """What all runs of a comparison have in common.

    Attributes:
        make_data: Function from a seed to the data module with training, validation and test datasets; the
            seed is that of the batches. Worker processes get it by pickling.
        max_epochs: Number of training epochs of each run.
        accelerator: Accelerator of the trainer.
        trainer_options: Further arguments of the `Trainer` that trains, with values that JSON can hold.
        make_loggers: Function from the name of a run to loggers besides the CSV logger, or None.
        description: Further options that decide results, such as the batch size. A comparison is continued
            only under the same ones.
    """

    make_data: Callable[[int], RetrievalDataModule]
    max_epochs: int
    accelerator: str = "cpu"
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    make_loggers: Callable[[str], Sequence[Logger]] | None = None
    description: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """The finished runs of a comparison.

    Attributes:
        tuning: Runs of the first seed with each candidate, method by method.
        raw: Runs with the settings that are best for search by cosine similarity, method by method, seed by
            seed.
        calibrated: Runs with the settings that are best for calibrated search, in the same order, without the
            methods whose models have an interaction and so no calibrated search; none if they were not asked
            for.
        failed: Runs of the first seed whose training diverged. They count as tried, and are not chosen.
    """

    tuning: tuple[Run, ...]
    raw: tuple[Run, ...]
    calibrated: tuple[Run, ...]
    failed: tuple[FailedRun, ...] = ()


@dataclass(frozen=True)
class _Job:
    """A run to do."""

    method: Method
    settings: Settings
    seed: int
    stage: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.method.name, settings_text(self.settings), self.seed


def compare(
    methods: Sequence[Method],
    protocol: Protocol,
    output: Path,
    *,
    seeds: Sequence[int] = range(5),
    jobs: int = 1,
    threads: int = 1,
    calibrated: bool = True,
    log: Callable[[str], object] = print,
    on_run: Callable[[Run | FailedRun], object] | None = None,
) -> Comparison:
    """Tune every method with the same number of runs, then run every seed with what was chosen.

    The first seed trains each method with each of its candidates. Two are kept for the other seeds, often the
    same: the one with the highest mean recall on the validation part by cosine similarity, and the one with
    the highest in calibrated search, since a model that is searched so is tuned for it. A model with an
    interaction has the first only, by its interaction. Their runs are the method's runs of the first seed.
    Test metrics choose nothing.

    A candidate whose training diverges, so that its embeddings contain NaN or Inf, has been tried and is not
    chosen. A method all of whose candidates diverge ends the comparison.

    Every finished run is a line of `runs.csv`, every diverged one of `failed.csv`; what is there is not
    trained again.

    Args:
        methods: Methods with equally many candidates, at least one.
        protocol: What all runs have in common.
        output: Folder of `runs.csv`, logs and checkpoints.
        seeds: Seeds, at least one; settings are chosen on the first.
        jobs: Number of runs at a time. More than one run in processes of their own.
        threads: Number of CPU threads of each run.
        calibrated: Whether settings are chosen for calibrated search as well, which trains up to twice as
            many runs.
        log: A function that is called with a line about each finished run.
        on_run: A function that is called with each finished run, instead of `log`.

    Returns:
        The runs that settings were chosen from, and those with the chosen settings.

    Raises:
        ValueError: Methods or seeds are missing or double, the methods have not equally many candidates or
            names that differ in signs alone.
        RunsError: The folder holds runs under another protocol, or of a method with other options or
            candidates, or what it holds is damaged.
        OSError: A run failed because the system refused something, such as to write to a full disk. Runs that
            are finished stay in `runs.csv`.
        RuntimeError: All candidates of a method diverged, or a run failed otherwise; the same holds.
    """
    _check(methods, seeds)
    check_count("jobs", jobs)
    check_count("threads", threads)
    table = RunTable(output)
    finished, failed = table.read(), table.read_failed()
    _check_protocol(methods, protocol, calibrated, output, has_runs=bool(finished or failed))
    _check_candidates(methods, [*finished.values(), *failed.values()], output)
    _check_folders(methods, seeds, [*finished.values(), *failed.values()], output)
    done: set[tuple[str, str, int]] = set()
    total: set[tuple[str, str, int]] = set()

    def run_all(wanted: Sequence[_Job]) -> None:
        total.update(job.key for job in wanted)
        there = finished.keys() | failed.keys()
        missing = {job.key: job for job in wanted if job.key not in there}
        done.update(job.key for job in wanted if job.key in there)
        train = partial(_train, protocol, calibrated, output)
        for run in _train_all(list(missing.values()), train, jobs, threads):
            key = (run.method, settings_text(run.settings), run.seed)
            if isinstance(run, FailedRun):
                table.append_failed(run)
                failed[key] = run
            else:
                table.append(run)
                finished[key] = run
            done.add(key)
            if on_run is None:
                log(f"[{len(done)}/{len(total)}] {describe_run(run)}")
            else:
                on_run(run)

    tuning = {
        method.name: [_Job(method, settings, seeds[0], "tune") for settings in method.candidates]
        for method in methods
    }
    run_all([job for candidates in tuning.values() for job in candidates])
    _check_that_some_are_left(tuning, failed)

    def chosen(part: str) -> list[_Job]:
        """The runs of all seeds with each method's candidate that is best in a part of `Metrics`."""
        jobs = []
        for method in methods:
            reached = [
                (mean_recall(recalls), job)
                for job in tuning[method.name]
                if job.key in finished and (recalls := getattr(finished[job.key].metrics, part)) is not None
            ]
            if reached:
                _, best = max(reached, key=lambda pair: pair[0])
                jobs += [_Job(method, best.settings, seed, "test") for seed in seeds]
        return jobs

    best_raw = chosen("validation")
    best_calibrated = chosen("validation_calibrated") if calibrated else []
    run_all([*best_raw, *best_calibrated])
    return Comparison(
        tuning=tuple(
            finished[job.key] for candidates in tuning.values() for job in candidates if job.key in finished
        ),
        raw=tuple(finished[job.key] for job in best_raw),
        calibrated=tuple(finished[job.key] for job in best_calibrated),
        failed=tuple(
            failed[job.key] for candidates in tuning.values() for job in candidates if job.key in failed
        ),
    )


def describe_run(run: Run | FailedRun) -> str:
    """A run in one line: method, settings, seed, and what it reached on validation or why it ended.

    Args:
        run: A finished run, or one that diverged.
    """
    if isinstance(run, FailedRun):
        label = settings_label(run.settings)
        return f"{run.method}, {label}, seed {run.seed}: diverged, so it is not chosen. {run.reason}"
    recall = 100 * mean_recall(run.metrics.validation)
    return (
        f"{run.method}, {settings_label(run.settings)}, seed {run.seed}: validation mean recall "
        f"{recall:.1f} % ({run.seconds:.0f} s)"
    )


def _check(methods: Sequence[Method], seeds: Sequence[int]) -> None:
    """Refuse methods that are not tuned alike."""
    names = [method.name for method in methods]
    for argument, values in (("methods", names), ("seeds", list(seeds))):
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"Argument `{argument}` has to hold at least one value and none twice, but got {values}."
            )
    counts = {method.name: len(set(map(settings_text, method.candidates))) for method in methods}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(
            "Every method has to have the same number of different candidates, at least one, but got "
            f"{listed}. Tune all methods alike."
        )


def _check_protocol(
    methods: Sequence[Method], protocol: Protocol, calibrated: bool, output: Path, *, has_runs: bool
) -> None:
    """Refuse a folder of runs under another protocol; note in it the protocol, and that of new methods."""
    options = {
        "max_epochs": protocol.max_epochs,
        "accelerator": protocol.accelerator,
        **protocol.trainer_options,
        "calibrated": calibrated,
        **(protocol.description or {}),
    }
    own = {method.name: method.description for method in methods}
    present: dict[str, Any] = json.loads(json.dumps({**options, _METHODS: own}, default=_as_json))
    file = output / "protocol.json"
    wanted = present.pop(_METHODS)
    if has_runs and not file.exists():
        raise RunsError(
            f"{file} is missing, so nothing says how the runs beside it were trained. Put it back, or use "
            "another folder."
        )
    try:
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else dict(present)
        kept = {name: dict(description) for name, description in stored.pop(_METHODS, {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise RunsError(
            f"{file} is damaged ({error}), so it does not say how the runs beside it were trained. Use "
            "another folder, or remove this one."
        ) from error
    changed = _changes(stored, present)
    for name in wanted:
        changed += [f"{name}: {change}" for change in _changes(kept.get(name, wanted[name]), wanted[name])]
    if changed:
        raise RunsError(
            f"{output} holds runs under another protocol: {', '.join(changed)}. Use another folder, or "
            "remove this one."
        )
    with atomic_write(file) as temporary:
        content = json.dumps({**present, _METHODS: kept | wanted}, indent=2)
        temporary.write_text(content + "\n", encoding="utf-8")


def _as_json(value: object) -> object:
    """An option for JSON that is the same in every process: functions by their names, not by their places."""
    if isinstance(value, partial):
        return [value.func, *value.args, *([value.keywords] if value.keywords else [])]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def _changes(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of options, for a reader."""
    return [
        f"{name} {stored.get(name)!r} → {present.get(name)!r}"
        for name in sorted({**stored, **present})
        if stored.get(name) != present.get(name)
    ]


def _check_candidates(methods: Sequence[Method], finished: Sequence[Run | FailedRun], output: Path) -> None:
    """Refuse methods that have been tuned with more candidates than they are said to have.

    Where there is a single one, nothing is chosen.
    """
    for method in methods:
        if len(method.candidates) == 1:
            continue
        candidates = {settings_text(settings) for settings in method.candidates}
        tried = {
            settings_text(run.settings): settings_label(run.settings)
            for run in finished
            if run.method == method.name
        }
        others = [label for text, label in tried.items() if text not in candidates]
        if others:
            raise RunsError(
                f"{output} holds runs of {method.name} with settings that are no candidates any more "
                f"({'; '.join(others)}), so it would have been tuned with more runs than are counted. Use "
                "another folder, or remove this one."
            )


def _check_folders(
    methods: Sequence[Method], seeds: Sequence[int], finished: Sequence[Run | FailedRun], output: Path
) -> None:
    """Refuse runs that would write to the folder of others, because their names differ in signs alone."""
    runs = [(run.method, run.settings, run.seed) for run in finished]
    runs += [
        (method.name, settings, seed)
        for method in methods
        for settings in method.candidates
        for seed in seeds
    ]
    owners: dict[Path, tuple[str, Settings]] = {}
    for name, settings, seed in runs:
        folder = run_folder(output, name, settings, seed)
        other, other_settings = owners.setdefault(folder, (name, settings))
        if (other, settings_text(other_settings)) != (name, settings_text(settings)):
            raise ValueError(
                f"The runs of {other!r} with {settings_label(other_settings)} and of {name!r} with "
                f"{settings_label(settings)} would share the folder {folder.name!r}. Give the methods names "
                "that differ in letters or digits."
            )


def _check_that_some_are_left(
    tuning: Mapping[str, Sequence[_Job]], failed: Mapping[tuple[str, str, int], FailedRun]
) -> None:
    """Refuse methods without a candidate that has not diverged."""
    for name, candidates in tuning.items():
        if all(job.key in failed for job in candidates):
            reasons = "; ".join(
                f"{settings_label(job.settings)}: {failed[job.key].reason}" for job in candidates
            )
            raise RuntimeError(
                f"All candidates of {name} diverged, so there is nothing to choose. Lower the learning rate, "
                f"and use another folder. {reasons}"
            )


def _train_all(
    wanted: Sequence[_Job], train: Callable[[_Job], Run | FailedRun], jobs: int, threads: int
) -> Iterator[Run | FailedRun]:
    """Train, and yield each run as it ends."""
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for job in wanted:
                yield train(job)
        finally:
            torch.set_num_threads(before)
        return
    if not wanted:
        return
    # A forked copy of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(jobs, len(wanted)), context, initializer=_start_worker, initargs=(threads,)
    ) as pool:
        futures = [pool.submit(train, job) for job in wanted]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    silence_lightning()


def _end_with_parent() -> None:
    """Wait for the end of the process that has started this one, and end.

    If it was killed, this one would go on, and write to the folders of a comparison that is continued.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(protocol: Protocol, calibrated: bool, output: Path, job: _Job) -> Run | FailedRun:
    started = time.perf_counter()
    folder = run_folder(output, job.method.name, job.settings, job.seed)
    shutil.rmtree(folder, ignore_errors=True)  # what was computed of earlier weights is not of these
    loggers = () if protocol.make_loggers is None else protocol.make_loggers(folder.name)
    try:
        metrics = train_and_evaluate(
            lambda: job.method.build(job.settings),
            protocol.make_data(job.seed),
            seed=job.seed,
            folder=folder,
            max_epochs=protocol.max_epochs,
            accelerator=protocol.accelerator,
            trainer_options=protocol.trainer_options,
            loggers=loggers,
            calibrated=calibrated,
        )
    except Exception as error:
        if isinstance(error, NonFiniteEmbeddingsError) and job.stage == "tune":
            _finish(loggers)
            return FailedRun(job.method.name, job.settings, job.seed, str(error))
        # What the system refuses, such as a full disk, is for the user to mend.
        kind = OSError if isinstance(error, OSError) else RuntimeError
        raise kind(
            f"The run of {job.method.name} with {settings_label(job.settings)}, seed {job.seed}, failed: "
            f"{error}"
        ) from error
    _finish(loggers)
    return Run(
        job.method.name, job.settings, job.seed, job.stage, metrics, time.perf_counter() - started, folder
    )


def _finish(loggers: Sequence[Logger]) -> None:
    for logger in loggers:
        if callable(finish := getattr(getattr(logger, "experiment", None), "finish", None)):
            finish()  # or wandb would add the next run to this one
