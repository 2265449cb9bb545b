"""Methods compared under one protocol: same seeds, same temperature grid, tuned on validation only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ask_lightning.metrics.table import heading
from ask_lightning.utilities.text_tables import Cell, markdown_table

RECALLS = tuple(f"{direction}/recall_at_{k}" for direction in ("a2t", "t2a") for k in (1, 5, 10))


@dataclass(frozen=True)
class Run:
    """One training run and what it reached.

    Attributes:
        method: Name of the method.
        temperature: Temperature τ of the loss.
        seed: Seed of the weights and the batches.
        validation: Validation metrics of the best epoch, under the names in `RECALLS`.
        test: Test metrics of the same epoch's weights.
        folder: Folder of the run's logs and checkpoints.
    """

    method: str
    temperature: float
    seed: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    folder: Path = field(default=Path(), compare=False)


def mean_recall(metrics: Mapping[str, float]) -> float:
    """The mean of R@1, R@5 and R@10 of both directions: what temperatures and epochs are chosen by.

    Args:
        metrics: Metrics that include those named in `RECALLS`.

    Examples:
        >>> mean_recall(dict.fromkeys(RECALLS, 0.5))
        0.5
    """
    return statistics.fmean(metrics[name] for name in RECALLS)


def compare(
    train: Callable[[str, float, int], Run],
    methods: Sequence[str],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    *,
    log: Callable[[str], object] = print,
) -> list[Run]:
    """Tune every method's temperature in the same way, then run every seed with it.

    The first seed trains each method at each temperature; the one with the highest mean validation recall
    is kept for the other seeds. No method sees more temperatures, seeds or epochs than another, and test
    metrics choose nothing.

    Args:
        train: A function that takes method, temperature and seed, and returns the finished run.
        methods: Names of the methods, at least one.
        temperatures: The grid of temperatures, at least one.
        seeds: Seeds, at least one; temperatures are tuned on the first.
        log: A function that is called with a line about each finished run.

    Returns:
        The runs at each method's chosen temperature, method by method, seed by seed.

    Raises:
        ValueError: There is no method, no temperature or no seed.

    Examples:
        >>> def train(method, temperature, seed):
        ...     scores = dict.fromkeys(RECALLS, 1 - abs(temperature - 0.1))
        ...     return Run(method, temperature, seed, scores, scores)
        >>> [run.temperature for run in compare(train, ["NT-Xent", "ASK"], [0.05, 0.1], [0], log=len)]
        [0.1, 0.1]
    """
    if not methods or not temperatures or not seeds:
        raise ValueError(
            "Arguments `methods`, `temperatures` and `seeds` have to hold at least one value each."
        )
    total = len(methods) * (len(temperatures) + len(seeds) - 1)
    finished = 0

    def report(method: str, temperature: float, seed: int) -> Run:
        nonlocal finished
        started = time.perf_counter()
        run = train(method, temperature, seed)
        finished += 1
        log(
            f"[{finished}/{total}] {method:12} τ = {temperature:<6g}seed {seed}: validation mean recall "
            f"{100 * mean_recall(run.validation):.1f} % ({time.perf_counter() - started:.0f} s)"
        )
        return run

    tuned = {method: [report(method, value, seeds[0]) for value in temperatures] for method in methods}
    runs = []
    for method, candidates in tuned.items():
        best = max(candidates, key=lambda run: mean_recall(run.validation))
        runs += [best, *(report(method, best.temperature, seed) for seed in seeds[1:])]
    return runs


def comparison_markdown(runs: Iterable[Run], metrics: Sequence[str] = RECALLS) -> str:
    """A table of test metrics in percent, mean ± standard deviation over the seeds of each method.

    Args:
        runs: The runs that `compare` returned.
        metrics: Names of the metrics in the columns, such as `"a2t/recall_at_1"`.

    Returns:
        The table in Markdown. A method with a single seed has no deviation.

    Examples:
        >>> run = Run("ASK", 0.07, 0, {}, {"a2t/recall_at_1": 0.123})
        >>> print(comparison_markdown([run], ["a2t/recall_at_1"]))
        | method | τ | seeds | A2T R@1 |
        |---|---|---|---|
        | ASK | 0.07 | 1 | 12.3 |
    """
    by_method: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        by_method.setdefault((run.method, run.temperature), []).append(run)
    rows: list[list[Cell]] = []
    for (method, temperature), group in by_method.items():
        cells = [_mean_and_deviation([100 * run.test[name] for run in group]) for name in metrics]
        rows.append([method, f"{temperature:g}", len(group), *cells])
    return markdown_table(["method", "τ", "seeds", *(heading(name) for name in metrics)], rows)


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
