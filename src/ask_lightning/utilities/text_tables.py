"""Tables as text: Markdown and CSV for files and loggers, and a drawn table for a terminal."""

import csv
import io
from collections.abc import Sequence

from ask_lightning.utilities.optional_imports import import_optional

Cell = str | float
"""A text or a number."""

# A table that does not go to a terminal is as wide as its cells.
_UNLIMITED_WIDTH = 100_000

_GREEK = (r"\alpha", r"\beta", r"\lambda", r"\rho", r"\tau", r"\Psi")
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "…": r"\dots{}",
        **{letter: f"${name}$" for letter, name in zip("αβλρτΨ", _GREEK, strict=True)},
    }
)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, float_format: str = "") -> str:
    """A table in Markdown.

    Args:
        columns: Headings of the columns.
        rows: Rows of as many cells.
        float_format: Format of floating-point cells, such as `".1f"`.

    Returns:
        Lines of text, without a line break at the end.

    Examples:
        >>> print(markdown_table(["split", "R@1"], [["val", 12.34], ["test", 11.0]], float_format=".1f"))
        | split | R@1 |
        |---|---|
        | val | 12.3 |
        | test | 11.0 |
    """

    def line(cells: Sequence[str]) -> str:
        # A bar or a line break in a cell would end it.
        escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    body = [line(_as_texts(row, float_format)) for row in rows]
    return "\n".join([line(columns), "|---" * len(columns) + "|", *body])


def csv_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    r"""A table as comma-separated values.

    Args:
        columns: Headings of the columns.
        rows: Rows of as many cells.

    Returns:
        Lines of text, each with a line break at its end.

    Examples:
        >>> csv_table(["clip", "caption"], [["a.wav", "rain, wind"]])
        'clip,caption\na.wav,"rain, wind"\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def latex_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, float_format: str = "") -> str:
    r"""A table in LaTeX, with the rules of the package booktabs.

    Args:
        columns: Headings of the columns.
        rows: Rows of as many cells.
        float_format: Format of floating-point cells, such as `".1f"`.

    Returns:
        A `tabular` environment; the first column is aligned to the left, others to the right.

    Examples:
        >>> print(latex_table(["method", "R@1 (%)"], [["ASK", "42.0 ± 0.3"]]))
        \begin{tabular}{lr}
        \toprule
        method & R@1 (\%) \\
        \midrule
        ASK & 42.0 $\pm$ 0.3 \\
        \bottomrule
        \end{tabular}
    """

    def line(cells: Sequence[str]) -> str:
        return " & ".join(" ".join(cell.split()).translate(_LATEX) for cell in cells) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            line(columns),
            r"\midrule",
            *(line(_as_texts(row, float_format)) for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, float_format: str = "") -> None:
    """Print a table to the standard output, drawn by rich; in Markdown where rich is not installed.

    Args:
        columns: Headings of the columns.
        rows: Rows of as many cells. Columns of numbers are aligned to the right.
        float_format: Format of floating-point cells, such as `".1f"`.

    Examples:
        >>> print_table(["rank", "clip"], [[1, "rain.wav"], [10, "wind.wav"]])
        ... # doctest: +NORMALIZE_WHITESPACE
        <BLANKLINE>
          rank   clip
         ─────────────────
             1   rain.wav
            10   wind.wav
        <BLANKLINE>
    """
    try:
        console_module = import_optional("rich.console")
    except ImportError:
        print(markdown_table(columns, rows, float_format=float_format))
        return
    table = import_optional("rich.table").Table(box=import_optional("rich.box").SIMPLE_HEAD)
    for place, column in enumerate(columns):
        is_numeric = all(isinstance(row[place], int | float) for row in rows)
        table.add_column(column, justify="right" if is_numeric else "left")
    for row in rows:
        table.add_row(*_as_texts(row, float_format))
    # Cells are texts as they are: brackets in a caption are no markup.
    console = console_module.Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _UNLIMITED_WIDTH
    console.print(table)


def _as_texts(row: Sequence[Cell], float_format: str) -> list[str]:
    """The cells of a row as they are shown."""
    return [format(cell, float_format) if isinstance(cell, float) else str(cell) for cell in row]
