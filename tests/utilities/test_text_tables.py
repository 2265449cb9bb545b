"""Tables as text: what a cell may hold, and where rich is missing."""

import csv
import io
import sys

from ask_lightning.utilities.text_tables import csv_table, markdown_table, print_table

ROWS = [["a | b\nc", 1.25], ["[red]d[/red]", 10.0]]


def test_a_cell_of_markdown_stays_one_cell():
    assert markdown_table(["text", "number"], ROWS, float_format=".1f").splitlines() == [
        "| text | number |",
        "|---|---|",
        "| a \\| b c | 1.2 |",
        "| [red]d[/red] | 10.0 |",
    ]


def test_csv_holds_what_was_written():
    assert list(csv.reader(io.StringIO(csv_table(["text", "number"], ROWS)))) == [
        ["text", "number"],
        ["a | b\nc", "1.25"],
        ["[red]d[/red]", "10.0"],
    ]


def test_a_printed_table_shows_texts_as_they_are_and_is_not_cut(capsys):
    print_table(["text", "number"], [["x" * 300, 1.25], ["[red]d :smile:", 10.0]], float_format=".2f")
    printed = capsys.readouterr().out
    assert "x" * 300 in printed
    assert "[red]d :smile:" in printed
    assert "\x1b" not in printed
    numbers = [line.rstrip() for line in printed.splitlines() if line.rstrip().endswith(("1.25", "10.00"))]
    assert len({len(line) for line in numbers}) == 1, "numbers are aligned to the right"


def test_without_rich_a_table_is_printed_in_markdown(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_table(["rank"], [[1]])
    assert capsys.readouterr().out == "| rank |\n|---|\n| 1 |\n"
