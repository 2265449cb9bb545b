"""The columns of a table of one's own: found by their usual names, or asked for by name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ask_lightning.data.splits import SPLITS, Split

AUTO = "auto"
"""In place of the name of a column: it is found by its usual names."""

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "filename": (
        *("filename", "file_name", "file", "filepath", "file_path", "path", "audio", "audio_path"),
        *("audio_file", "audio_filename", "audio_filepath", "wav", "wav_path", "wav_file", "sound", "fname"),
    ),
    "captions": ("caption", "text", "description", "sentence", "transcription", "transcript"),
    "clip_id": ("clip_id", "recording_id"),
    "split": ("split", "subset", "set", "partition"),
}
"""Usual names of columns, the first ones preferred. They are compared without regard to capitals and to what
stands between words: a space, `_` or `-`. Those of captions may have an s or a number behind them."""

_DELIMITERS = (",", ";", "\t", "|")
_NAMES_OF_SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training", "development", "dev_train"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        filename: Name of the column of audio files.
        captions: Names of the columns of captions.
        clip_id: Name of the column of clip ids, or None.
        split: Name of the column that says to which split a file belongs, or None.
    """

    filename: str
    captions: tuple[str, ...]
    clip_id: str | None = None
    split: str | None = None


def find_columns(
    where: str | Path,
    header: Sequence[str],
    *,
    filename: str = AUTO,
    captions: str | Sequence[str] = AUTO,
    clip_id: str | None = AUTO,
    split: str | None = None,
) -> Columns:
    """Find the columns of a table.

    Args:
        where: Path of the table, for errors.
        header: Names of the columns that the table has.
        filename: Name of the column of audio files, or `"auto"`.
        captions: Name of the column of captions, or names of several columns, or `"auto"`.
        clip_id: Name of the column of clip ids, `"auto"`, or None for none.
        split: Name of the column of splits, `"auto"`, or None for none.

    Returns:
        The names of the columns. Names that were passed are not looked up.

    Raises:
        ValueError: There is no column of files, or of captions, with a usual name.

    Examples:
        >>> find_columns("clips.csv", ["File", "caption_1", "caption_2", "source"])
        Columns(filename='File', captions=('caption_1', 'caption_2'), clip_id=None, split=None)
    """
    found = {role: _usual(role, header) for role in USUAL_NAMES}
    if filename == AUTO:
        filename = _required(where, header, found["filename"], "filename", "filename_column")[0]
    if captions == AUTO:
        captions = _required(where, header, found["captions"], "captions", "caption_columns")
    optional = {
        role: next(iter(found[role]), None) if given == AUTO else given
        for role, given in (("clip_id", clip_id), ("split", split))
    }
    names = (captions,) if isinstance(captions, str) else tuple(captions)
    return Columns(filename, names, **optional)


def find_delimiter(text: str) -> str:
    r"""The character between the fields of a table, as its header line tells.

    Args:
        text: Content of the table.

    Examples:
        >>> find_delimiter("file;caption\na.wav;rain, then wind"), find_delimiter("file\na.wav")
        (';', ',')
    """
    header = next((line for line in text.splitlines() if line.strip()), "")
    outside_quotes = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=outside_quotes.count)


def split_named(name: str) -> Split | None:
    """The split that a name stands for, or None.

    Args:
        name: A name such as `"validation"` or `"Train"`.

    Examples:
        >>> [split_named(name) for name in ("Training", "dev", "evaluation", "fold 1")]
        ['train', 'val', 'test', None]
    """
    return _NAMES_OF_SPLITS.get(_plain(name))


def splits_of(where: str | Path, names: Mapping[str, str], column: str) -> dict[str, Split]:
    """The splits of files.

    Args:
        where: Path of the table, for errors.
        names: What the table calls the split of each file.
        column: Name of the column, for errors.

    Returns:
        The split of each file.

    Raises:
        ValueError: A name stands for no split.

    Examples:
        >>> splits_of("clips.csv", {"a.wav": "Train", "b.wav": "valid"}, "split")
        {'a.wav': 'train', 'b.wav': 'val'}
    """
    splits: dict[str, Split] = {}
    for file, name in names.items():
        split = split_named(name)
        if split is None:
            raise ValueError(
                f"{where}: column {column!r} says {name!r} of {file!r}, but has to say one of "
                f"{', '.join(SPLITS)} (or training, validation, dev, evaluation). Correct it, name another "
                "column as `split_column`, or pass null for it to divide the clips at random."
            )
        splits[file] = split
    return splits


def _plain(name: str) -> str:
    """A name without regard to capitals and to what stands between its words."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _usual(role: str, header: Sequence[str]) -> list[str]:
    """The columns of a header whose names are usual for a role: of captions all of one name, else one."""
    for usual in USUAL_NAMES[role]:
        pattern = rf"{usual}s?(_?\d+)?" if role == "captions" else usual
        found = [name for name in header if re.fullmatch(pattern, _plain(name))]
        if found:
            return found
    return []


def _required(
    where: str | Path, header: Sequence[str], found: Sequence[str], role: str, argument: str
) -> list[str]:
    """The columns that were found for a role that a table needs."""
    if not found:
        first, *others = USUAL_NAMES[role]
        raise ValueError(
            f"{where}: no column {first!r} or of another usual name ({', '.join(others)}); it has "
            f"{list(header)}. Name the column that holds "
            f"{'the audio files' if role == 'filename' else 'the captions'} by the argument `{argument}`."
        )
    return list(found)
