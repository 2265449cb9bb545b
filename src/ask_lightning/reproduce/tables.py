"""The tables of a comparison: recall by method, and differences to one of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ask_lightning.metrics.table import RECALLS, heading, mean_recall
from ask_lightning.reproduce.run_table import Run, settings_label
from ask_lightning.reproduce.statistics import PairedDifference, paired_difference
from ask_lightning.utilities.text_tables import Cell, markdown_table

_SEARCHES = {"raw": "test", "calibrated": "test_calibrated"}


def comparison_markdown(runs: Iterable[Run]) -> str:
    """A table of test recalls in percent, raw and calibrated, mean ± standard deviation over the seeds.

    Args:
        runs: Runs that `compare` returned.

    Returns:
        The table in Markdown. A method with a single seed has no deviation.
    """
    rows: list[list[Cell]] = []
    for method, group in _by_method(runs).items():
        settings = settings_label(group[0].settings)
        for search, part in _SEARCHES.items():
            found = [getattr(run.metrics, part) for run in group]
            cells = [_mean_and_deviation([100 * metrics[name] for metrics in found]) for name in RECALLS]
            average = _mean_and_deviation([100 * mean_recall(metrics) for metrics in found])
            rows.append([method, settings, len(group), search, *cells, average])
    columns = ["method", "settings", "seeds", "search", *(heading(name) for name in RECALLS), "mean"]
    return markdown_table(columns, rows)


def differences_markdown(runs: Iterable[Run], reference: str) -> str:
    """A table of paired differences of the mean test recall to one method, in percentage points.

    Args:
        runs: Runs that `compare` returned.
        reference: Name of the method to compare with.

    Returns:
        The table in Markdown, with a 95 % interval and the p-value of a paired t-test over the seeds. With a
        single seed there is neither.

    Raises:
        ValueError: No run is of that method, or the methods have different seeds.
    """
    by_method = _by_method(runs)
    if reference not in by_method:
        raise ValueError(f"Argument `reference` has to be one of {list(by_method)}, but got {reference!r}.")
    seeds = {method: [run.seed for run in group] for method, group in by_method.items()}
    if any(own != seeds[reference] for own in seeds.values()):
        raise ValueError(f"Argument `runs` has to hold the same seeds for each method, but got {seeds}.")
    rows: list[list[Cell]] = []
    for method, group in by_method.items():
        if method == reference:
            continue
        for search, part in _SEARCHES.items():
            values, others = (
                [100 * mean_recall(getattr(run.metrics, part)) for run in side]
                for side in (group, by_method[reference])
            )
            rows.append([method, search, *_difference_cells(paired_difference(values, others))])
    return markdown_table(["method", "search", f"minus {reference}", "95 % interval", "p"], rows)


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return {method: sorted(group, key=lambda run: run.seed) for method, group in by_method.items()}


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _difference_cells(difference: PairedDifference) -> list[str]:
    mean = f"{difference.mean:+.2f}"
    if math.isnan(difference.p):
        return [mean, "–", "–"]
    p = "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    return [mean, f"{difference.low:+.2f} … {difference.high:+.2f}", p]
