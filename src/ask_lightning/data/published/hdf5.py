"""HDF5 files as ML-ACT packs AudioCaps and Clotho."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ask_lightning.data.audio.decoding import ArrayRecording, AudioFileError, Recording
from ask_lightning.data.clips import Clip, ClipCollector
from ask_lightning.data.keys import recording_key
from ask_lightning.utilities.optional_imports import import_optional

_HDF5_COLUMNS = ("audio_name", "audio_length", "waveform", "caption")


class HDF5Store:
    """Audio in a packed HDF5 file of ML-ACT. Each process opens the file when it first needs it.

    Args:
        path: Path of the file.
        sample_rate: Rate of the waveforms in Hz, which is not written in the file.

    Examples:
        >>> HDF5Store("train.h5", 32000).origin(Clip("youtube:a", ("ducks",), "a", row=7))
        (PosixPath('train.h5'), 'row 7 at 32000 Hz')
    """

    def __init__(self, path: str | Path, sample_rate: int) -> None:
        self._path = Path(path)
        self._sample_rate = sample_rate
        self._opened: tuple[int, Any] | None = None
        self._state = _state_of(self._path) if self._path.exists() else None

    @contextmanager
    def open(self, clip: Clip) -> Iterator[Recording]:
        """Open a row; see `AudioStore`."""
        file = self._open_file()
        frames = min(int(file["audio_length"][clip.row]), file["waveform"].shape[1])
        name = f"{self._path}, {clip.name!r}"
        yield ArrayRecording(name, _HDF5Row(file["waveform"], clip.row), frames, self._sample_rate)  # type: ignore[arg-type]

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file, and the row of a clip with the rate that it is taken to have; see `AudioStore`."""
        # The file does not hold the rate, so nothing else tells what was read at one rate from another.
        return self._path, f"row {clip.row} at {self._sample_rate} Hz"

    def _open_file(self) -> Any:
        # Captions are of the rows as they were. An open file stays the old one, whatever replaces it, and a
        # cache would take what is read from it for the content of the new one.
        if self._state != _state_of(self._path):
            raise AudioFileError(f"{self._path}: the file has changed since the start. Start anew.")
        # HDF5 handles cannot be shared with a forked worker.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), import_optional("h5py").File(self._path, "r")
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class _HDF5Row:
    """A row of a two-dimensional HDF5 dataset; slices are read from disk when they are taken."""

    def __init__(self, dataset: Any, row: int) -> None:
        self._dataset = dataset
        self._row = row

    def __getitem__(self, part: slice) -> Any:
        return self._dataset[self._row, part]


def _state_of(path: Path) -> tuple[int, int]:
    """Time of change and size of a file."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def read_hdf5(path: str | Path, namespace: str) -> list[Clip]:
    """Read the names and captions of a packed file of ML-ACT.

    Args:
        path: Path of the file, which has the datasets `audio_name` `(N,)`, `audio_length` `(N,)`, `waveform`
            `(N, T)` and `caption` `(N,)` or `(N, captions)`.
        namespace: Namespace of the keys: `"youtube"` for AudioCaps, `"file"` for Clotho.

    Returns:
        The clips with their row numbers.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: h5py is missing.
        ValueError: It is no HDF5 file, or lacks a dataset.

    Examples:
        >>> import h5py
        >>> path = getfixture("tmp_path") / "val.h5"
        >>> with h5py.File(path, "w") as file:
        ...     file["audio_name"], file["caption"] = ["Yb0RFKhbpFJA.wav"], [["wind", "it blows"]]
        ...     file["audio_length"], file["waveform"] = [2], [[0.0, 0.1]]
        >>> [(clip.key, clip.captions) for clip in read_hdf5(path, "youtube")]
        [('youtube:b0RFKhbpFJA', ('wind', 'it blows'))]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no HDF5 file at {path}. Correct the path.")
    h5py = import_optional("h5py")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not an HDF5 file, or one that was cut short ({error}).") from error
    with file:
        missing = [column for column in _HDF5_COLUMNS if column not in file]
        if missing:
            raise ValueError(
                f"{path}: no dataset {', '.join(map(repr, missing))}; it has {sorted(file)}. The packed "
                f"files of ML-ACT have {', '.join(_HDF5_COLUMNS)}."
            )
        names, captions = file["audio_name"][:], file["caption"][:]
    collector = ClipCollector(str(path))
    for row, (name, texts) in enumerate(zip(names, captions, strict=True)):
        title = _decode_text(name)
        collector.add(
            f"row {row}",
            recording_key(namespace, title),
            [_decode_text(texts)]
            if isinstance(texts, (bytes, str))
            else [_decode_text(text) for text in texts],
            name=title,
            row=row,
        )
    return collector.clips()


def _decode_text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
