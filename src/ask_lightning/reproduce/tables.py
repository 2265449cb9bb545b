"""The tables of a comparison: recall by method, and differences to one of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from ask_lightning.metrics.table import RECALLS, heading, mean_recall
from ask_lightning.reproduce.comparison import Comparison
from ask_lightning.reproduce.run_table import Run, settings_label
from ask_lightning.reproduce.statistics import PairedDifference, paired_difference
from ask_lightning.utilities.text_tables import Cell, markdown_table

# Each kind of search, and the part of `Metrics` that holds its test metrics.
_SEARCHES = {"raw": "test", "calibrated": "test_calibrated"}


def comparison_markdown(comparison: Comparison) -> str:
    """A table of test recalls in percent, raw and calibrated, mean ± standard deviation over the seeds.

    Args:
        comparison: What `compare` returned.

    Returns:
        The table in Markdown. A method with a single seed has no deviation, and one whose models have an
        interaction no calibrated search.
    """
    rows: list[list[Cell]] = []
    by_search = {search: _by_method(getattr(comparison, search)) for search in _SEARCHES}
    for method in by_search["raw"]:
        for search, part in _SEARCHES.items():
            if (group := by_search[search].get(method)) is None:
                rows.append([method, "–", "–", search, *("–" for _ in RECALLS), "–"])
                continue
            found = [getattr(run.metrics, part) for run in group]
            cells = [mean_and_deviation([100 * metrics[name] for metrics in found]) for name in RECALLS]
            average = mean_and_deviation([100 * mean_recall(metrics) for metrics in found])
            rows.append([method, settings_label(group[0].settings), len(group), search, *cells, average])
    columns = ["method", "settings", "seeds", "search", *(heading(name) for name in RECALLS), "mean"]
    return markdown_table(columns, rows)


def differences_markdown(comparison: Comparison, reference: str) -> str:
    """A table of paired differences of the mean test recall to one method, in percentage points.

    Args:
        comparison: What `compare` returned.
        reference: Name of the method to compare with.

    Returns:
        The table in Markdown, with a 95 % interval and the p-value of a paired t-test over the seeds. With a
        single seed there is neither, and where one of the two has no calibrated search there is nothing.

    Raises:
        ValueError: No run is of that method, or the methods have different seeds.
    """
    rows: list[list[Cell]] = []
    methods = list(_by_method(comparison.raw))
    if reference not in methods:
        raise ValueError(f"Argument `reference` has to be one of {methods}, but got {reference!r}.")
    for search, part in _SEARCHES.items():
        by_method = _by_method(getattr(comparison, search))
        seeds = {method: [run.seed for run in group] for method, group in by_method.items()}
        if len(set(map(tuple, seeds.values()))) > 1:
            raise ValueError(
                f"Argument `comparison` has to hold the same seeds for each method, but got {seeds}."
            )
        for method in methods:
            if method == reference:
                continue
            if method not in by_method or reference not in by_method:
                rows.append([method, search, "–", "–", "–"])
                continue
            values, others = (
                [100 * mean_recall(getattr(run.metrics, part)) for run in by_method[name]]
                for name in (method, reference)
            )
            rows.append([method, search, *difference_cells(paired_difference(values, others))])
    rows.sort(key=lambda row: methods.index(str(row[0])))
    return markdown_table(["method", "search", f"minus {reference}", "95 % interval", "p"], rows)


def tuning_markdown(comparison: Comparison) -> str:
    """A table of what each candidate reached on validation with the first seed, in percent.

    Args:
        comparison: What `compare` returned.

    Returns:
        The table in Markdown, the best candidate of each method and kind of search in bold, and candidates
        that diverged behind the others.
    """
    rows: list[list[Cell]] = []
    for method, group in _by_method(comparison.tuning).items():
        columns = []
        for part in ("validation", "validation_calibrated"):
            found = [getattr(run.metrics, part) for run in group]
            if None in found:
                columns.append(["–" for _ in found])
                continue
            values = [100 * mean_recall(recalls) for recalls in found]
            best = values.index(max(values))  # the one that `compare` chose
            columns.append(
                [
                    f"**{value:.1f}**" if place == best else f"{value:.1f}"
                    for place, value in enumerate(values)
                ]
            )
        rows += [
            [method, settings_label(run.settings), raw, calibrated]
            for run, raw, calibrated in zip(group, *columns, strict=True)
        ]
        rows += [
            [method, settings_label(run.settings), "diverged", "diverged"]
            for run in comparison.failed
            if run.method == method
        ]
    return markdown_table(["method", "candidate", "raw", "calibrated"], rows)


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return {method: sorted(group, key=lambda run: run.seed) for method, group in by_method.items()}


def mean_and_deviation(values: Sequence[float]) -> str:
    """A cell with mean ± standard deviation; a single value has no deviation.

    Args:
        values: Values of the seeds.

    Examples:
        >>> mean_and_deviation([20.0, 22.0])
        '21.0 ± 1.4'
    """
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def difference_cells(difference: PairedDifference) -> list[str]:
    """Cells with a difference, its 95 % interval, and p.

    Args:
        difference: What `paired_difference` returned.

    Examples:
        >>> difference_cells(PairedDifference(1.25, 0.5, 2.0, 0.0004))
        ['+1.25', '+0.50 … +2.00', '< 0.001']
    """
    mean = f"{difference.mean:+.2f}"
    if math.isnan(difference.p):
        return [mean, "–", "–"]
    p = "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    return [mean, f"{difference.low:+.2f} … {difference.high:+.2f}", p]
