"""Tables of audio files and their captions."""

from collections.abc import Sequence
from pathlib import Path

from ask_lightning.data.clips import Clip
from ask_lightning.data.keys import recording_key
from ask_lightning.data.tables import check_columns, check_width, numbered_rows, read_text


def read_captions(
    annotations: str | Path,
    *,
    filename_column: str = "filename",
    caption_columns: str | Sequence[str] = "caption",
    clip_id_column: str | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> list[Clip]:
    r"""Read a CSV with a header line. A file with several captions has several columns, or several rows.

    Args:
        annotations: Path of the CSV.
        filename_column: Name of the column of audio files.
        caption_columns: Name of the column of captions, or names of several columns.
        clip_id_column: Name of the column of clip ids, which may be any texts. Files with the same clip id
            are takes of one recording, and all their captions are correct for each of them. None: each file
            is a recording of its own.
        delimiter: Character between the fields.
        encoding: Encoding of the CSV.

    Returns:
        One clip for each file, in the order in which the files first appear. Its key is `file:` and the name
        of the file as written in the table.

    Raises:
        FileNotFoundError: There is no such CSV.
        ValueError: It is empty, in another encoding, lacks a column, has a row with too many or too few
            fields, an empty field, or a file with two clip ids. The message says where, and what to do.

    Examples:
        >>> path = getfixture("tmp_path") / "clips.csv"
        >>> _ = path.write_text("filename,caption\na.wav,rain\nb.wav,wind\na.wav,it rains")
        >>> [(clip.path, clip.captions) for clip in read_captions(path)]
        [('a.wav', ('rain', 'it rains')), ('b.wav', ('wind',))]
    """
    table = Path(annotations)
    columns_of_captions = [caption_columns] if isinstance(caption_columns, str) else list(caption_columns)
    if not columns_of_captions:
        raise ValueError("Argument `caption_columns` has to name at least one column, but got none.")
    rows = numbered_rows(table, read_text(table, encoding), delimiter)
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{table} is empty. It needs a header line and a row for each audio file.")
    columns = [filename_column, *columns_of_captions] + ([] if clip_id_column is None else [clip_id_column])
    remedy = "Name the columns by the arguments `filename_column`, `caption_columns` and `clip_id_column`."
    check_columns(table, header, columns, delimiter, remedy)

    captions: dict[str, list[str]] = {}
    clip_ids: dict[str, str] = {}
    for line, fields in rows:
        where = f"{table}, line {line}"
        check_width(table, line, fields, header, delimiter)
        row = dict(zip(header, fields, strict=True))
        for column in columns:
            if not row[column]:
                raise ValueError(
                    f"{where}: column {column!r} is empty. Fill it or remove the row; files with different "
                    "numbers of captions are written as one row for each caption."
                )
        filename = row[filename_column]
        clip_id = "" if clip_id_column is None else row[clip_id_column]
        earlier = clip_ids.setdefault(filename, clip_id)
        if earlier != clip_id:
            raise ValueError(
                f"{where}: {filename!r} has the clip id {clip_id!r}, but had {earlier!r} above. Give all "
                "rows of a file the same clip id."
            )
        captions.setdefault(filename, []).extend(row[column] for column in columns_of_captions)
    if not captions:
        raise ValueError(f"{table} has a header but no rows. It needs a row for each audio file.")
    return [
        Clip(
            f"file:{filename}",
            tuple(texts),
            name=filename,
            aliases=(recording_key("file", filename),),
            group=clip_ids[filename],
            path=filename,
        )
        for filename, texts in captions.items()
    ]
