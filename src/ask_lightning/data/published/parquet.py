"""Datasets with a column of audio: parquet files, and what the `datasets` library of Hugging Face loads."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from ask_lightning.data.audio.decoding import AudioFileError, Recording, open_audio
from ask_lightning.data.clips import Clip, ClipCollector
from ask_lightning.data.keys import file_stem, recording_key
from ask_lightning.data.tables import caption_columns
from ask_lightning.utilities.optional_imports import import_optional

_NAMES = ("youtube_id", "file_name", "filename", "audio_name", "fname", "id", "name")
_AUDIO = "audio"


class ParquetStore:
    """Audio in a column of parquet files.

    Files are read by row groups, and the last group stays in memory. Reading in order is fast; in random
    order each clip costs a whole group, so use a cache for training.

    Args:
        paths: Paths of the files, in order.

    Raises:
        ImportError: pyarrow is missing.

    Examples:
        >>> ParquetStore([]).num_rows
        0
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        parquet = import_optional("pyarrow.parquet")
        self._groups: list[tuple[int, int]] = []  # (file, group)
        sizes: list[int] = []
        for number, path in enumerate(self._paths):
            metadata = parquet.ParquetFile(path).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends = list(accumulate(sizes))
        self._loaded: tuple[int, int, Any] | None = None  # process, group, column

    @property
    def num_rows(self) -> int:
        """Number of rows of all files together."""
        return self._ends[-1] if self._ends else 0

    @contextmanager
    def open(self, clip: Clip) -> Iterator[Recording]:
        """Open the audio of a row; see `AudioStore`."""
        path, column, row = self._find(clip)
        content = _cell_content(column[row].as_py(), path.parent)
        with open_audio(f"{path}, {clip.name!r}", content) as recording:
            yield recording

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file and the row of a clip; see `AudioStore`."""
        group = bisect_right(self._ends, clip.row)
        return self._paths[self._groups[group][0]], f"row {clip.row}"

    def _find(self, clip: Clip) -> tuple[Path, Any, int]:
        """The file of a clip, the column of audio in its row group, and its row in that column."""
        number = bisect_right(self._ends, clip.row)
        file, group = self._groups[number]
        if self._loaded is None or self._loaded[:2] != (os.getpid(), number):
            reader = import_optional("pyarrow.parquet").ParquetFile(self._paths[file])
            column = reader.read_row_group(group, columns=[_AUDIO]).column(_AUDIO)
            self._loaded = os.getpid(), number, column
        column = self._loaded[2]
        return self._paths[file], column, clip.row - (self._ends[number] - len(column))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}


class HubStore:
    """Audio in a column of a dataset that the `datasets` library loaded.

    Args:
        dataset: One split, with its column of audio not decoded.
        name: Name of the dataset, for errors.

    Examples:
        >>> HubStore([], "demo").origin(Clip("a", ("rain",), "a", row=0))
        (PosixPath('demo'), 'row 0')
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self._name = name

    @contextmanager
    def open(self, clip: Clip) -> Iterator[Recording]:
        """Open the audio of a row; see `AudioStore`."""
        content = _cell_content(self._dataset[clip.row][_AUDIO], Path())
        with open_audio(f"{self._name}, {clip.name!r}", content) as recording:
            yield recording

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file and the row of a clip; see `AudioStore`."""
        files = getattr(self._dataset, "cache_files", None)
        return Path(files[0]["filename"] if files else self._name), f"row {clip.row}"


def read_parquet(paths: Sequence[str | Path], namespace: str) -> tuple[list[Clip], ParquetStore]:
    """Read the names and captions of parquet files with a column `audio`.

    Args:
        paths: Paths of the files of one split.
        namespace: Namespace of the keys: `"youtube"` for AudioCaps, `"file"` for Clotho.

    Returns:
        The clips with their row numbers, and the store of their audio.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: A file is not parquet, or lacks a column.

    Examples:
        >>> import pyarrow, pyarrow.parquet
        >>> path = getfixture("tmp_path") / "test-00000-of-00001.parquet"
        >>> audio = [{"bytes": b"", "path": "a.wav"}]
        >>> columns = {"youtube_id": ["b0RFKhbpFJA"], "caption": ["wind"], "audio": audio}
        >>> pyarrow.parquet.write_table(pyarrow.table(columns), path)
        >>> read_parquet([path], "youtube")[0][0].key
        'youtube:b0RFKhbpFJA'
    """
    parquet = import_optional("pyarrow.parquet")
    rows: list[dict[str, Any]] = []
    files = [Path(path) for path in paths]
    for path in files:
        try:
            columns = parquet.ParquetFile(path).schema_arrow.names
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a parquet file, or one that was cut short ({error}).") from error
        _check_audio_and_captions(str(path), columns)
        wanted = _wanted_columns(columns)
        if not any(name in _NAMES for name in wanted):
            rows += _named_by_audio_path(parquet.read_table(path).to_pylist())
            continue
        rows += parquet.read_table(path, columns=wanted).to_pylist()
    return _rows_to_clips(f"{files[0].parent}", rows, namespace), ParquetStore(files)


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


def read_hub(name: str, dataset: Any, namespace: str) -> tuple[list[Clip], HubStore]:
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
    datasets = import_optional("datasets")
    _check_audio_and_captions(name, dataset.column_names)
    dataset = dataset.cast_column(_AUDIO, datasets.Audio(decode=False))
    wanted = _wanted_columns(dataset.column_names)
    if any(column in _NAMES for column in wanted):
        rows = dataset.select_columns(wanted).to_list()
    else:
        rows = _named_by_audio_path(dataset.select_columns([*wanted, _AUDIO]).to_list())
    return _rows_to_clips(name, rows, namespace), HubStore(dataset, name)


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


def _named_by_audio_path(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rows without a name the path that goes with their audio as name."""
    for row in rows:
        audio = row.pop(_AUDIO)
        row["file_name"] = audio if isinstance(audio, str) else (audio or {}).get("path") or ""
    return rows


def _rows_to_clips(where: str, rows: Sequence[Mapping[str, Any]], namespace: str) -> list[Clip]:
    """Make clips of rows with a name and captions."""
    collector = ClipCollector(where)
    seen: set[str] = set()
    for number, row in enumerate(rows):
        name = next((str(row[column]) for column in _NAMES if row.get(column)), "")
        if not name:
            raise ValueError(
                f"{where}, row {number}: no name. A row needs one of {', '.join(_NAMES)}, or a path with its "
                "audio."
            )
        captions = [row[column] for column in caption_columns(row)]
        texts = [text for given in captions for text in ([given] if isinstance(given, str) else given or [])]
        audiocap = "" if row.get("audiocap_id") is None else str(row["audiocap_id"])
        start = row.get("start_time")
        collector.add(
            f"row {number}",
            recording_key(namespace, name),
            texts,
            name=file_stem(name) if namespace == "youtube" else name,
            aliases=[recording_key("audiocap", audiocap)] if audiocap else [],
            repeated=bool(audiocap) and audiocap in seen,  # the captions of a clip may be rows of their own
            start=None if start is None else int(float(start)),
            row=number,
        )
        seen.add(audiocap)
    return collector.clips()


def _cell_content(audio: Any, folder: Path) -> Path | bytes:
    """The audio in a cell: the bytes of a file, or its path."""
    if isinstance(audio, Mapping):
        audio = audio.get("bytes") or audio.get("path")
    if isinstance(audio, bytes):
        return audio
    if isinstance(audio, str):
        return folder / audio
    raise AudioFileError(f"a row of {folder}: the cell of its audio is empty. Remove the row.")
