"""Retrieval metrics as rows of the paper's tables: percent, both directions."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.text_tables import Cell, csv_table


def heading(metric: str) -> str:
    """The heading of a metric in the paper's tables.

    Args:
        metric: A name such as `"a2t/recall_at_1"`.

    Examples:
        >>> heading("t2a/map_at_10")
        'T2A mAP@10'
    """
    direction, _, name = metric.partition("/")
    return f"{direction.upper()} {name.replace('recall_at_', 'R@').replace('map_at_', 'mAP@')}"


DIRECTIONS = ("a2t", "t2a")
"""Audio-to-text and text-to-audio retrieval, as the names of metrics begin."""

RECALLS = tuple(f"{direction}/recall_at_{k}" for direction in DIRECTIONS for k in (1, 5, 10))
"""Names of the recalls that epochs and methods are compared by."""


CALIBRATED = "calibrated/"
"""Prefix of the names of metrics of calibrated search."""


def mean_recall(
    metrics: Mapping[str, float | Tensor], prefix: str = "", directions: Sequence[str] = DIRECTIONS
) -> float:
    """The mean of R@1, R@5 and R@10, by default of both directions: what epochs and settings are chosen by.

    Args:
        metrics: Metrics by name. Some names of `RECALLS` may be missing, as in the logs of a model that
            measures one direction only; without any the mean is 0.
        prefix: Prefix of the names, such as `CALIBRATED`.
        directions: Directions of which the recalls count.

    Examples:
        >>> mean_recall(dict.fromkeys(RECALLS, 0.5))
        0.5
    """
    names = (prefix + name for name in RECALLS if name.startswith(tuple(directions)))
    found = [float(metrics[name]) for name in names if name in metrics]
    return statistics.fmean(found) if found else 0.0


COLUMNS = {
    metric: heading(metric)
    for direction in DIRECTIONS
    for metric in (*(name for name in RECALLS if name.startswith(direction)), f"{direction}/map_at_10")
}
"""Headings of the paper's tables, by the names of the metrics."""

Scores = Mapping[str, float]
"""Percent by the names of `COLUMNS`."""


def percentages(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The scores of a table out of all that was logged.

    Args:
        metrics: Logged values, as fractions, by their names.
        prefix: Prefix of the names, such as `"test/"`.

    Returns:
        Percent by the names of `COLUMNS`; empty if they were not logged.

    Examples:
        >>> percentages({"test/a2t/recall_at_1": 0.5, "loss": 3.0}, "test/")
        {'a2t/recall_at_1': 50.0}
    """
    return {
        name: round(100 * float(metrics[prefix + name]), 4) for name in COLUMNS if prefix + name in metrics
    }


def score_table(rows: Mapping[str, Scores], first_column: str) -> tuple[list[str], list[list[Cell]]]:
    """Scores as a table with a row for each name.

    Args:
        rows: Percent by the names of `COLUMNS`, by the name of the row.
        first_column: Heading of the column of names.

    Returns:
        Headings and rows, with the columns that any row has; a score that is missing is an empty text.

    Examples:
        >>> score_table({"Clotho": {"a2t/recall_at_1": 16.31, "t2a/recall_at_1": 14.2}}, "dataset")
        (['dataset', 'A2T R@1', 'T2A R@1'], [['Clotho', 16.31, 14.2]])
    """
    names = [name for name in COLUMNS if any(name in scores for scores in rows.values())]
    cells = [[row, *(scores.get(name, "") for name in names)] for row, scores in rows.items()]
    return [first_column, *(COLUMNS[name] for name in names)], cells


def write_scores(path: Path, rows: Mapping[str, Scores]) -> None:
    """Write scores as CSV and, beside it, as JSON, under the names of the metrics.

    Args:
        path: Path of the CSV file.
        rows: Percent by the names of `COLUMNS`, by the name of the row.
    """
    cells = [[row, *(scores.get(name, "") for name in COLUMNS)] for row, scores in rows.items()]
    for file, content in (
        (path, csv_table(["dataset", *COLUMNS], cells)),
        (path.with_suffix(".json"), json.dumps(rows, indent=2) + "\n"),
    ):
        with atomic_write(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
