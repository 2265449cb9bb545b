"""CSV and JSON files, read with errors that say where the mistake is and what to do."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.clips import abbreviate

_SEPARATORS = (";", "\t", "|", ",")
_CAPTION_COLUMN = re.compile(r"captions?(?:_\d+)?")


def caption_columns(columns: Iterable[str]) -> list[str]:
    """The columns that hold captions, in every file with fixed column names.

    Args:
        columns: Names of all columns, or keys of an object.

    Returns:
        Those called `caption`, `captions`, or one of these with `_` and a number, in order; if there is none,
        a column called `text`.

    Examples:
        >>> caption_columns(["file_name", "caption_1", "caption_2"]), caption_columns(["audio", "text"])
        (['caption_1', 'caption_2'], ['text'])
    """
    names = list(columns)
    found = [name for name in names if _CAPTION_COLUMN.fullmatch(name)]
    return found or [name for name in names if name == "text"]


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file, without the byte order mark that Excel writes.

    Args:
        path: Path of the file.
        encoding: Encoding of the file.

    Raises:
        FileNotFoundError: There is no such file, or a folder in its place.
        ValueError: It is in another encoding, and the message names the line; or there is no such encoding.

    Examples:
        >>> path = getfixture("tmp_path") / "a.csv"
        >>> _ = path.write_bytes(b"filename,caption")
        >>> read_text(path)
        'filename,caption'
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file at {path}. Correct the path.") from None
    except IsADirectoryError:
        raise FileNotFoundError(f"{path} is a folder, not a table. Pass the path of a file in it.") from None
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise ValueError(
            f'Argument `encoding` has to be an encoding that Python knows, such as "utf-8" or "latin-1", '
            f"but got {encoding!r}."
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not valid {encoding}. Save the "
            "file as UTF-8; `iconv -f cp1252 -t utf-8` does so, or `-f utf-16`. Where there is an argument "
            "`encoding`, that may be passed instead."
        ) from error


def numbered_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""The lines of a CSV that are not blank, with their numbers; fields without the spaces around them.

    After the last row a warning names the rows that span several lines: a lost quotation mark makes a field
    of all that follows, up to the next one.

    Where lines end with a line feed, a carriage return of its own is a space: in the training captions of
    AudioCaps 2 three captions have one.

    Args:
        path: Path of the CSV, for errors.
        text: Content of the CSV.
        delimiter: Character between the fields.

    Raises:
        ValueError: A double quote is misplaced.

    Examples:
        >>> list(numbered_rows(Path("a.csv"), "a, b\n\nc,d", ","))
        [(1, ['a', 'b']), (3, ['c', 'd'])]
    """
    if "\n" in text:
        text = re.sub(r"\r(?!\n)", " ", text)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    spanning: list[str] = []
    try:
        for fields in reader:
            if fields:
                if any("\n" in field for field in fields):
                    spanning.append(f"up to line {reader.line_num}")
                yield reader.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        problem = str(error)
        if "field limit" in problem:
            problem = f"a field is longer than {csv.field_size_limit()} characters"
        remedy = (
            "Remove that character."  # which Python 3.10 alone refuses
            if "NUL" in problem
            else "Look for a double quote that is not closed or not doubled; inside a quoted field it is "
            'written "".'
        )
        raise ValueError(f"{path}, line {reader.line_num}: {problem}. {remedy}") from error
    if spanning:
        rank_zero_warn(
            f"{path}: {len(spanning)} rows span several lines ({abbreviate(spanning)}). Was a double quote "
            "lost? Then a field has swallowed the rows below it."
        )


def check_columns(
    path: Path,
    header: Sequence[str],
    columns: Sequence[str],
    delimiter: str,
    remedy: str,
    *,
    published: bool = False,
) -> None:
    """Raise unless each column is there once.

    Args:
        path: Path of the table, for errors.
        header: Columns that the table has.
        columns: Columns that the table needs.
        delimiter: Character between the fields. A header of a single field may have another one.
        remedy: Advice about a missing column, the end of the message.
        published: Whether the format is fixed, so that another delimiter is a fault of the file.

    Raises:
        ValueError: A column is missing or repeated.

    Examples:
        >>> check_columns(Path("a.csv"), ["filename", "caption"], ["caption"], ",", "Add it.")
    """
    missing = [column for column in columns if column not in header]
    if missing:
        for separator in _SEPARATORS:
            if len(header) == 1 and separator != delimiter and separator in header[0]:
                remedy = f"Its fields look separated by {separator!r}: " + (
                    f"save it with {delimiter!r} between them, as it is published."
                    if published
                    else f"pass `delimiter={separator!r}`."
                )
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, missing))}; it has {list(header)}. {remedy}"
        )
    repeated = [column for column in columns if header.count(column) > 1]
    if repeated:
        raise ValueError(f"{path}: more than one column is called {repeated[0]!r}. Rename all but one.")


def check_width(path: Path, line: int, fields: Sequence[str], header: Sequence[str], delimiter: str) -> None:
    """Raise unless a row has as many fields as the header.

    Args:
        path: Path of the table, for errors.
        line: Line number of the row.
        fields: Fields of the row.
        header: Columns of the table.
        delimiter: Character between the fields.

    Raises:
        ValueError: The row is longer or shorter.

    Examples:
        >>> check_width(Path("a.csv"), 2, ["a.wav", "rain"], ["filename", "caption"], ",")
    """
    if len(fields) != len(header):
        raise ValueError(
            f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}. "
            f"Put double quotes around a field that contains {delimiter!r}."
        )


def read_header(path: Path) -> list[str]:
    """The names of the columns of a CSV in UTF-8.

    Args:
        path: Path of the CSV.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty or in another encoding.

    Examples:
        >>> path = getfixture("tmp_path") / "a.csv"
        >>> _ = path.write_text("filename,caption")
        >>> read_header(path)
        ['filename', 'caption']
    """
    _, header = next(numbered_rows(path, read_text(path), ","), (0, []))
    if not header:
        raise ValueError(f"{path} is empty. It needs a header line and rows below it.")
    return header


def read_rows(path: Path, columns: Sequence[str], *, remedy: str) -> Iterator[tuple[int, dict[str, str]]]:
    r"""The rows of a published CSV: UTF-8, commas, a header line.

    Args:
        path: Path of the CSV.
        columns: Names of the columns that the CSV needs; it may have more.
        remedy: Advice about a missing column, the end of the message.

    Returns:
        For each row its line number and its fields by column.

    Raises:
        FileNotFoundError: There is no such CSV.
        ValueError: It is empty, in another encoding, lacks a column or has a row of another width.

    Examples:
        >>> path = getfixture("tmp_path") / "a.csv"
        >>> _ = path.write_text("filename,caption\na.wav,rain")
        >>> list(read_rows(path, ["caption"], remedy="Add it."))
        [(2, {'filename': 'a.wav', 'caption': 'rain'})]
    """
    rows = numbered_rows(path, read_text(path), ",")
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{path} is empty. It needs a header line and rows below it.")
    check_columns(path, header, columns, ",", remedy, published=True)
    for line, fields in rows:
        check_width(path, line, fields, header, ",")
        yield line, dict(zip(header, fields, strict=True))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Args:
        path: Path of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8 or not JSON; the message names the place.

    Examples:
        >>> path = getfixture("tmp_path") / "a.json"
        >>> _ = path.write_text('{"num_captions_per_audio": 1}')
        >>> read_json(path)
        {'num_captions_per_audio': 1}
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Was the download cut short? Get it anew."
        ) from error
