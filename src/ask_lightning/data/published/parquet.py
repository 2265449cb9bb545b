"""Tables with a column of audio, read by the `datasets` library: parquet files and datasets of the hub."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ask_lightning.data.audio.decoding import AudioFileError, Recording, open_audio
from ask_lightning.data.clips import Clip, ClipCollector
from ask_lightning.data.keys import file_stem, recording_key, stretch_keys
from ask_lightning.data.tables import caption_columns
from ask_lightning.utilities.optional_imports import import_optional

_NAMES = ("youtube_id", "file_name", "filename", "audio_name", "fname", "id", "name")
_AUDIO = "audio"


class ColumnStore:
    """Audio in a column of a table that the `datasets` library reads.

    Args:
        dataset: One split, with its column of audio not decoded.
        name: Name of the dataset, for errors.
        folder: Folder to which the paths of audio in the table are relative.

    Examples:
        >>> ColumnStore([], "demo").origin(Clip("a", ("rain",), "a", row=0))
        (PosixPath('demo'), 'row 0')
    """

    def __init__(self, dataset: Any, name: str, folder: Path = Path()) -> None:
        self._dataset = dataset
        self._name = name
        self._folder = folder
        # Of which looking at a cell copies no audio.
        self._in_arrow = dataset.select_columns(_AUDIO).with_format("arrow") if len(dataset) else None
        self._files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", ())]
        # Which of the files holds a row is not known: a row is another one when any of them is.
        states = [(state.st_mtime_ns, state.st_size) for state in map(Path.stat, self._files[1:])]
        self._others = "".join(f", {changed} {size}" for changed, size in states)

    @contextmanager
    def open(self, clip: Clip) -> Iterator[Recording]:
        """Open the audio of a row; see `AudioStore`."""
        content = _cell_content(self._dataset[clip.row][_AUDIO], self._folder)
        with open_audio(f"{self._name}, {clip.name!r}", content) as recording:
            yield recording

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file of a clip, or the table that holds its audio and the row; see `AudioStore`."""
        if (path := self._path_in_cell(clip.row)) is not None:
            return self._folder / path, ""
        return self._files[0] if self._files else Path(self._name), f"row {clip.row}{self._others}"

    def _path_in_cell(self, row: int) -> str | None:
        """The path in a cell that holds no audio itself."""
        if self._in_arrow is None:
            return None
        cell = self._in_arrow[row][_AUDIO][0]  # a struct of bytes and path
        if cell["bytes"].is_valid and cell["bytes"].as_buffer().size:
            return None
        path: str | None = cell["path"].as_py()
        return path or None


def read_parquet(paths: Sequence[str | Path], namespace: str) -> tuple[list[Clip], ColumnStore]:
    """Read the names and captions of parquet files with a column `audio`.

    The `datasets` library keeps a copy of the table in its cache folder, from which clips are read in any
    order without loading the table into memory.

    Args:
        paths: Paths of the files of one split.
        namespace: Namespace of the keys: `"youtube"` for AudioCaps, `"file"` for Clotho.

    Returns:
        The clips with their row numbers, and the store of their audio.

    Raises:
        ImportError: The `datasets` library is missing.
        ValueError: A file is not parquet, or lacks a column.
    """
    datasets = import_optional("datasets")
    files = [Path(path) for path in paths]
    for path in files:
        try:
            columns = import_optional("pyarrow.parquet").read_schema(path).names
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a parquet file, or one that was cut short ({error}).") from error
        _check_audio_and_captions(str(path), columns)
    dataset = datasets.Dataset.from_parquet([str(path) for path in files])
    return _read_table(f"{files[0].parent}", dataset, namespace, files[0].parent)


def load_hub(name: str) -> dict[str, Any]:
    """Load a dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote.

    Args:
        name: Name of the dataset, or path of the folder.

    Returns:
        Its splits by name, as the `datasets` library has them.

    Raises:
        ImportError: The `datasets` library is missing.
    """
    datasets = import_optional("datasets")
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}


def read_hub(name: str, dataset: Any, namespace: str) -> tuple[list[Clip], ColumnStore]:
    """Read the names and captions of a split.

    Args:
        name: Name of the dataset and split, for errors.
        dataset: One of the splits that `load_hub` returns.
        namespace: Namespace of the keys: `"youtube"` for AudioCaps, `"file"` for Clotho.

    Returns:
        The clips with their row numbers, and the store of their audio.

    Raises:
        ValueError: It lacks a column.
    """
    _check_audio_and_captions(name, dataset.column_names)
    return _read_table(name, dataset, namespace, Path())


def cast_audio(dataset: Any, column: str) -> Any:
    """A table whose column of audio holds bytes and paths, not decoded, in whatever form it was written.

    Args:
        dataset: The table, as the `datasets` library has it.
        column: Name of its column of audio.

    Returns:
        The table with the column as `datasets.Audio(decode=False)`.
    """
    datasets = import_optional("datasets")
    if getattr(dataset.features[column], "dtype", "") == "large_string":
        # Paths as pandas 3 and polars write them, which the library takes for no text.
        dataset = dataset.cast_column(column, datasets.Value("string"))
    return dataset.cast_column(column, datasets.Audio(decode=False))


def _read_table(where: str, dataset: Any, namespace: str, folder: Path) -> tuple[list[Clip], ColumnStore]:
    """The clips of a table, and the store of its audio, whose paths are relative to a folder."""
    dataset = cast_audio(dataset, _AUDIO)
    wanted = _wanted_columns(dataset.column_names)
    rows = dataset.select_columns(wanted).to_list()
    if not any(column in _NAMES for column in wanted):
        # Of the audio, the bytes beside the path are not read.
        paths = dataset.select_columns(_AUDIO).flatten().select_columns(f"{_AUDIO}.path").to_list()
        rows = [row | {"file_name": path[f"{_AUDIO}.path"]} for row, path in zip(rows, paths, strict=True)]
    return _rows_to_clips(where, rows, namespace), ColumnStore(dataset, where, folder)


def _wanted_columns(columns: Sequence[str]) -> list[str]:
    """The columns that describe clips."""
    wanted = {*_NAMES, "audiocap_id", "start_time", *caption_columns(columns)}
    return [column for column in columns if column in wanted]


def _check_audio_and_captions(where: str, columns: Sequence[str]) -> None:
    """Refuse a table without a column of audio or of captions."""
    if _AUDIO not in columns or not caption_columns(columns):
        raise ValueError(
            f"{where}: it needs a column 'audio' and one called caption, captions, caption_1 or text, "
            f"but has {list(columns)}. Rename its columns."
        )


def _rows_to_clips(where: str, rows: Sequence[Mapping[str, Any]], namespace: str) -> list[Clip]:
    """Make clips of rows with a name and captions."""
    named: list[tuple[str, int | None]] = []
    starts: dict[str, set[int | None]] = defaultdict(set)
    for number, row in enumerate(rows):
        name = next((str(row[column]) for column in _NAMES if row.get(column) not in (None, "")), "")
        if not name:
            raise ValueError(
                f"{where}, row {number}: no name. A row needs one of {', '.join(_NAMES)}, or a path with its "
                "audio."
            )
        start = _start(row, f"{where}, row {number}")
        named.append((name, start))
        starts[recording_key(namespace, name)].add(start)
    collector = ClipCollector(where)
    seen: set[str] = set()
    for number, ((name, start), row) in enumerate(zip(named, rows, strict=True)):
        texts = [
            text
            for column in caption_columns(row)
            for text in texts_of_cell(row[column], f"{where}, row {number}: column {column!r}")
        ]
        audiocap = "" if row.get("audiocap_id") is None else str(row["audiocap_id"])
        recording = recording_key(namespace, name)
        key, aliases = stretch_keys(recording, start, starts[recording])
        collector.add(
            f"row {number}",
            key,
            texts,
            name=file_stem(name) if namespace == "youtube" else name,
            aliases=[*aliases, recording_key("audiocap", audiocap)] if audiocap else aliases,
            repeated=bool(audiocap) and audiocap in seen,  # the captions of a clip may be rows of their own
            start=start,
            row=number,
        )
        seen.add(audiocap)
    return collector.clips()


def texts_of_cell(cell: object, place: str) -> list[str]:
    """The captions in a cell: one, several, or none.

    Args:
        cell: A text, a list of texts, or null; nulls in a list and NaN, as pandas writes them, are none.
        place: File, row and column of the cell, for errors.

    Raises:
        ValueError: The cell holds something else.

    Examples:
        >>> texts_of_cell("rain", ""), texts_of_cell(["rain", None], ""), texts_of_cell(None, "")
        (['rain'], ['rain'], [])
    """
    listed = list(cell) if isinstance(cell, list | tuple) else [cell]
    given = [one for one in listed if one is not None and not (isinstance(one, float) and math.isnan(one))]
    texts = [one for one in given if isinstance(one, str)]
    if len(texts) < len(given):
        raise ValueError(
            f"{place} has to hold a caption or a list of captions, but holds {cell!r:.60}. Keep the texts "
            "alone, or name another column."
        )
    return texts


def _start(row: Mapping[str, Any], place: str) -> int | None:
    """The start of a clip in whole seconds, if the row has it."""
    start = row.get("start_time")
    try:
        return None if start is None else int(float(start))
    except (TypeError, ValueError, OverflowError):  # of infinity
        raise ValueError(
            f"{place}: start_time has to be a number of seconds, but is {start!r}. Correct the table."
        ) from None


def _cell_content(audio: Any, folder: Path) -> Path | bytes:
    """The audio in a cell: the bytes of a file, or its path."""
    if isinstance(audio, Mapping):
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, bytes):
        return audio
    if isinstance(audio, str):
        return folder / audio
    raise AudioFileError(f"a row of {folder}: the cell of its audio is empty. Remove the row.")
