"""Retrieval metrics as rows of the paper's tables: percent, both directions."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path

from ask_lightning.utilities.atomic_files import written_whole

COLUMNS = {
    f"{direction}/{name}": f"{direction.upper()} {heading}"
    for direction in ("a2t", "t2a")
    for name, heading in (
        ("recall_at_1", "R@1"),
        ("recall_at_5", "R@5"),
        ("recall_at_10", "R@10"),
        ("map_at_10", "mAP@10"),
    )
}
"""Headings by the names under which `retrieval_metrics` has the scores."""

Scores = Mapping[str, float]


def percentages(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The scores of a table out of all that was logged.

    Args:
        metrics: By logged name, as fractions.
        prefix: Of the names, such as `"test/"`.

    Returns:
        Percent by the names of `COLUMNS`; empty if they were not logged.

    Examples:
        >>> percentages({"test/a2t/recall_at_1": 0.5, "loss": 3.0}, "test/")
        {'a2t/recall_at_1': 50.0}
    """
    return {
        name: round(100 * float(metrics[prefix + name]), 4) for name in COLUMNS if prefix + name in metrics
    }


def scores_markdown(rows: Mapping[str, Scores]) -> str:
    """A table with a row for each name.

    Args:
        rows: Percent by the names of `COLUMNS`.

    Examples:
        >>> print(scores_markdown({"Clotho": {"a2t/recall_at_1": 16.31, "t2a/recall_at_1": 14.2}}))
        | | A2T R@1 | T2A R@1 |
        |---|---|---|
        | Clotho | 16.3 | 14.2 |
    """
    names = [name for name in COLUMNS if any(name in scores for scores in rows.values())]
    lines = ["| " + "".join(f"| {COLUMNS[name]} " for name in names) + "|", "|---" * (len(names) + 1) + "|"]
    for row, scores in rows.items():
        cells = [f"{scores[name]:.1f}" if name in scores else "" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_scores(path: Path, rows: Mapping[str, Scores]) -> None:
    """Write the table as CSV and, beside it, as JSON.

    Args:
        path: Of the CSV.
        rows: Percent by the names of `COLUMNS`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("dataset", *COLUMNS))
    writer.writerows((row, *(scores.get(name, "") for name in COLUMNS)) for row, scores in rows.items())
    for file, content in (
        (path, text.getvalue()),
        (path.with_suffix(".json"), json.dumps(rows, indent=2) + "\n"),
    ):
        with written_whole(file) as temporary:
            temporary.write_text(content, encoding="utf-8")
