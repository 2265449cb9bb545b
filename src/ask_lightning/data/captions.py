"""Tables of audio files and their captions."""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.clips import Clip, ClipCollector, abbreviate, given_text
from ask_lightning.data.columns import AUTO, find_columns, find_delimiter
from ask_lightning.data.keys import recording_key
from ask_lightning.data.tables import check_columns, check_width, numbered_rows, read_text


def read_captions(
    annotations: str | Path,
    *,
    filename_column: str = AUTO,
    caption_columns: str | Sequence[str] = AUTO,
    clip_id_column: str | None = AUTO,
    delimiter: str = AUTO,
    encoding: str = "utf-8",
    collection: str = "",
    root: str | Path | None = None,
) -> list[Clip]:
    r"""Read a CSV with a header line. A file with several captions has several columns, or several rows.

    Oddities that do not prevent training are named in warnings: captions that are empty or `nan`, `None` and
    the like, which are left out; very long ones; rows that repeat a file with its captions, and equal
    captions of a file, which count once; files that are listed under several names.

    Args:
        annotations: Path of the CSV.
        filename_column: Name of the column of audio files. `"auto"`: it has one of the usual names, see
            `ask_lightning.data.columns`.
        caption_columns: Name of the column of captions, or names of several columns. `"auto"`: as above.
        clip_id_column: Name of the column of clip ids, which may be any texts. Files with the same clip id
            are takes of one recording, and all their captions are correct for each of them. None: each file
            is a recording of its own. `"auto"`: a column with a usual name, if there is one.
        delimiter: Character between the fields. `"auto"`: as the header tells.
        encoding: Encoding of the CSV.
        collection: Name that keeps the clip ids apart from those of other collections which give the same
            names or ids to other recordings. Tables of the same collection have to have the same.
        root: Folder of the audio files. With it, all names of one file stand for one clip: `a.wav`,
            `./a.wav`, its absolute path, and links. None: names are only compared.

    Returns:
        One clip for each file, in the order in which the files first appear. Its key is `file:` and the path
        of the file as written in the table, relative to the folder and without detours.

    Raises:
        FileNotFoundError: There is no such CSV.
        ValueError: It is empty, in another encoding, lacks a column, has a row with too many or too few
            fields, no captions at all, a row without file or clip id, or a file with two clip ids; or the
            delimiter is not one character. The message says where, and what to do.

    Examples:
        >>> path = getfixture("tmp_path") / "clips.csv"
        >>> _ = path.write_text("filename,caption\na.wav,rain\nb.wav,wind\na.wav,it rains")
        >>> [(clip.path, clip.captions) for clip in read_captions(path)]
        [('a.wav', ('rain', 'it rains')), ('b.wav', ('wind',))]
    """
    table = Path(annotations)
    if not caption_columns:
        raise ValueError("Argument `caption_columns` has to name at least one column, but got none.")
    if delimiter != AUTO and len(delimiter) != 1:
        raise ValueError(
            f'Argument `delimiter` has to be one character, but got {delimiter!r}. A tab is "\\t" in Python '
            "and YAML, and $'\\t' in a shell."
        )
    text = read_text(table, encoding)
    delimiter = find_delimiter(text) if delimiter == AUTO else delimiter
    rows = numbered_rows(table, text, delimiter)
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{table} is empty. It needs a header line and a row for each audio file.")
    columns = find_columns(
        table, header, filename=filename_column, captions=caption_columns, clip_id=clip_id_column
    )
    filename_column, columns_of_captions, clip_id_column = columns.filename, columns.captions, columns.clip_id
    needed = [filename_column] + ([] if clip_id_column is None else [clip_id_column])
    remedy = "Name the columns by the arguments `filename_column`, `caption_columns` and `clip_id_column`."
    check_columns(table, header, [*needed, *columns_of_captions], delimiter, remedy)

    collector = ClipCollector(str(table))
    prefix = f"{collection}/" if collection else ""
    first_names: dict[object, str] = {}  # by file
    seen: dict[str, set[str]] = {}  # captions by name
    clip_ids: dict[str, str] = {}
    renamed: dict[str, None] = {}
    doubled: list[str] = []
    for line, fields in rows:
        where = f"{table}, line {line}"
        check_width(table, line, fields, header, delimiter)
        row = dict(zip(header, fields, strict=True))
        for column in needed:
            if not given_text(row[column]):
                fault = f"says {row[column]!r}" if row[column] else "is empty"
                raise ValueError(f"{where}: column {column!r} {fault}. Fill it or remove the row.")
        filename = row[filename_column]
        name = first_names.setdefault(file_identity(filename, root), filename)
        if name != filename:
            renamed[f"{filename!r} is {name!r}"] = None
        clip_id = "" if clip_id_column is None else row[clip_id_column]
        earlier = clip_ids.setdefault(name, clip_id)
        if earlier != clip_id:
            raise ValueError(
                f"{where}: {filename!r} has the clip id {clip_id!r}, but had {earlier!r} above. Give all "
                f"rows of a file the same clip id; if {clip_id_column!r} holds none, pass "
                "`clip_id_column=None`."
            )
        captions = [row[column] for column in columns_of_captions]
        known = seen.setdefault(name, set())
        repeated = bool(known) and known.issuperset(captions)
        if not repeated:
            texts = [text for text in captions if given_text(text)]
            once = [text for text in dict.fromkeys(texts) if text not in known]
            doubled += [f"line {line}"] * (len(texts) - len(once))
            captions = once + [text for text in captions if not given_text(text)]
        path = plain_path(name, root)
        collector.add(
            f"line {line}",
            f"file:{prefix}{path}",
            captions,
            name=name,
            aliases=[recording_key("file", name)],
            repeated=repeated,
            group=clip_id and prefix + clip_id,
            path=name,
        )
        known.update(captions)
    if not seen:
        raise ValueError(f"{table} has a header but no rows. It needs a row for each audio file.")
    if renamed:
        rank_zero_warn(
            f"{table}: {len(renamed)} names stand for files that have another name above, and are one clip "
            f"with them: {abbreviate(list(renamed))}."
        )
    if doubled:
        rank_zero_warn(
            f"{table}: {len(doubled)} captions are equal to another one of their file, and count once: "
            f"{abbreviate(doubled)}."
        )
    return collector.clips()


def read_columns(
    annotations: str | Path, filename_column: str, *, delimiter: str, encoding: str
) -> dict[str, dict[str, str]]:
    r"""The columns of a CSV that `read_captions` has read, but for that of the files.

    Args:
        annotations: Path of the CSV.
        filename_column: Name of the column of audio files.
        delimiter: Character between the fields.
        encoding: Encoding of the CSV.

    Returns:
        For each column its value in the first row of each file.

    Examples:
        >>> path = getfixture("tmp_path") / "clips.csv"
        >>> _ = path.write_text("filename,source\na.wav,7\nb.wav,7")
        >>> read_columns(path, "filename", delimiter=",", encoding="utf-8")
        {'source': {'a.wav': '7', 'b.wav': '7'}}
    """
    table = Path(annotations)
    (_, names), *rows = numbered_rows(table, read_text(table, encoding), delimiter)
    place = names.index(filename_column)
    columns: dict[str, dict[str, str]] = {name: {} for name in names if name != filename_column}
    for _, fields in rows:
        for name, field in zip(names, fields, strict=True):
            if name != filename_column:
                columns[name].setdefault(fields[place], field)
    return columns


def read_split_names(
    annotations: str | Path,
    filename_column: str,
    split_column: str,
    *,
    delimiter: str,
    encoding: str,
    root: str | Path | None = None,
) -> dict[str, str]:
    r"""What a CSV that `read_captions` has read calls the split of each file.

    Args:
        annotations: Path of the CSV.
        filename_column: Name of the column of audio files.
        split_column: Name of the column of splits.
        delimiter: Character between the fields.
        encoding: Encoding of the CSV.
        root: Folder of the audio files, as for `read_captions`.

    Returns:
        The name of the split by the first name of the file, which is the path of its clip.

    Raises:
        ValueError: Rows of a file have different splits.

    Examples:
        >>> path = getfixture("tmp_path") / "clips.csv"
        >>> _ = path.write_text("filename,split\na.wav,train\nb.wav,test")
        >>> read_split_names(path, "filename", "split", delimiter=",", encoding="utf-8")
        {'a.wav': 'train', 'b.wav': 'test'}
    """
    table = Path(annotations)
    (_, header), *rows = numbered_rows(table, read_text(table, encoding), delimiter)
    file, split = header.index(filename_column), header.index(split_column)
    first_names: dict[object, str] = {}  # by file
    found: dict[str, str] = {}
    for line, fields in rows:
        name = first_names.setdefault(file_identity(fields[file], root), fields[file])
        earlier = found.setdefault(name, fields[split])
        if earlier != fields[split]:
            raise ValueError(
                f"{table}, line {line}: {fields[file]!r} is in the split {fields[split]!r}, but was in "
                f"{earlier!r} above. Give all rows of a file the same split."
            )
    return found


def file_identity(filename: str, root: str | Path | None) -> object:
    """What all names of one file have in common.

    Args:
        filename: One of its names, as a table has it.
        root: Folder of the audio files; None: names are only compared.

    Examples:
        >>> file_identity("./a.wav", None) == file_identity("a.wav", None)
        True
    """
    if root is not None:
        try:
            state = os.stat(Path(root, filename))
        except (OSError, ValueError):  # no such file, or no name of one: reported where files are opened
            pass
        else:
            if state.st_ino:
                return state.st_dev, state.st_ino
    return plain_path(filename, root)


def plain_path(filename: str, root: str | Path | None) -> str:
    """A path without detours, relative to the folder of the audio files if it leads there.

    Args:
        filename: The path as a table has it.
        root: Folder of the audio files; None: an absolute path stays one.

    Examples:
        >>> plain_path("./a//b.wav", None), plain_path("/sounds/b.wav", "/sounds")
        ('a/b.wav', 'b.wav')
    """
    path = posixpath.normpath(filename)
    if root is not None and os.path.isabs(path):
        inside = os.path.relpath(path, os.path.abspath(root))
        return path if inside.startswith("..") else Path(inside).as_posix()
    return path
