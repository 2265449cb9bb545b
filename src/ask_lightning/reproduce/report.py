"""Everything that a comparison has to show, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ask_lightning.reproduce.comparison import Comparison
from ask_lightning.reproduce.figures import comparison_picture
from ask_lightning.reproduce.tables import comparison_markdown, differences_markdown, tuning_markdown


def write_report(
    comparison: Comparison, output: Path, *, references: Sequence[str], refresh_every: int
) -> str:
    """Write the tables of a comparison to `comparison.md` and its picture to `comparison.png`.

    Args:
        comparison: What `compare` returned.
        output: Folder to write to.
        references: Names of the methods that the others are compared with by paired differences.
        refresh_every: Number of epochs T between refreshes of the knowledge.

    Returns:
        The tables in Markdown: test recalls, differences to each reference, candidates on validation.

    Raises:
        ImportError: matplotlib is missing, with what to install; the tables are written.
    """
    methods = {run.method for run in comparison.raw}
    tables = [comparison_markdown(comparison)]
    if len(methods) > 1:
        tables += [differences_markdown(comparison, name) for name in references]
    tables.append(tuning_markdown(comparison))
    text = "\n\n".join(tables)
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.md").write_text(text + "\n", encoding="utf-8")
    comparison_picture(comparison, output / "comparison.png", refresh_every=refresh_every)
    return text
