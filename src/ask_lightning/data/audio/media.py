"""Sound tracks of files that soundfile does not read, by PyAV. Axes: `T` samples, `C` channels."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ask_lightning.utilities.optional_imports import import_optional

Samples = npt.NDArray[np.float32]

MEDIA_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".aac", ".wma", ".webm", ".mkv", ".mka", ".avi", ".3gp", ".amr"}
)
"""File name endings of formats of which PyAV reads the sound track."""

# A decoder needs what lies before the wanted sample: of AAC and of most others less than 0.1 s.
_RUN_UP_SECONDS = 0.5


class NoSoundError(ValueError):
    """A file cannot be opened, or has no sound track; the message says which."""


class SoundTrack:
    """The first sound track of a file that PyAV has opened; see `Recording`.

    Args:
        name: Name of the file, for errors.
        container: Container of PyAV that is open for reading.
    """

    def __init__(self, name: str, container: Any) -> None:
        self.name = name
        self._container = container
        self._stream = container.streams.audio[0]
        self.rate = int(self._stream.codec_context.sample_rate)
        self._channels = int(self._stream.codec_context.channels)
        self._resampler = import_optional("av").AudioResampler(format="fltp")
        self.frames = 0
        self._pieces: Iterator[tuple[int, Samples]] = self._decode()
        self._rest = np.zeros((0, self._channels), dtype=np.float32)  # decoded and not yet read
        self._position = 0  # of the first sample of the rest
        self.frames = self._length()

    def read(self, start: int, count: int) -> Samples:
        """Read a range of samples; see `Recording`."""
        end = start + count
        if not self._position <= start <= self._position + len(self._rest) + self.rate:
            self._seek(max(0.0, start / self.rate - _RUN_UP_SECONDS))
            if self._position > start:  # its marks lie further apart
                self._seek(0.0)
        pieces, place = [], self._position
        piece = self._rest
        while True:
            wanted = piece[max(0, start - place) : max(0, end - place)]
            pieces.append(wanted)
            if place + len(piece) >= end:
                break
            following = next(self._pieces, None)
            if following is None:
                break
            place, piece = following
        self._rest, self._position = piece, place
        return np.concatenate(pieces)  # (T, C)

    def _length(self) -> int:
        """The length in samples that the file tells, or that of what it holds."""
        if self._stream.duration:
            return int(self._stream.duration * self._stream.time_base * self.rate)
        if self._container.duration:  # in microseconds
            return int(self._container.duration * self.rate / 1_000_000)
        frames = sum(len(piece) for _, piece in self._pieces)
        self._seek(0.0)
        return frames

    def _seek(self, seconds: float) -> None:
        """Go on decoding from a place or somewhat before it."""
        first = self._stream.start_time or 0
        self._container.seek(first + int(seconds / self._stream.time_base), stream=self._stream)
        self._pieces = self._decode()
        self._rest = self._rest[:0]
        self._position, self._rest = next(self._pieces, (self.frames, self._rest))
        if not seconds:  # what decoders leave out at their start is no gap
            self._position = 0

    def _decode(self) -> Iterator[tuple[int, Samples]]:
        """The samples from the present place on, piece by piece, and the number of the first of each."""
        place = None
        for frame in self._container.decode(self._stream):
            if place is None:
                since_start = 0 if frame.pts is None else frame.pts - (self._stream.start_time or 0)
                place = round(since_start * self._stream.time_base * self.rate)
            for converted in self._resampler.resample(frame):
                samples = np.ascontiguousarray(converted.to_ndarray().T, dtype=np.float32)  # (T, C)
                yield place, samples
                place += len(samples)


@contextmanager
def open_sound_track(name: str, content: Path | bytes) -> Iterator[SoundTrack]:
    """Open the first sound track of a file.

    Args:
        name: Name of the file, for errors.
        content: Path of the file, or its bytes.

    Raises:
        NoSoundError: PyAV cannot open it, or it has no sound track, or cannot be read to the wanted place.
        ImportError: PyAV is missing.
    """
    av = import_optional("av")
    try:
        container = av.open(io.BytesIO(content) if isinstance(content, bytes) else str(content))
    except (av.FFmpegError, ValueError) as error:
        raise NoSoundError(f"PyAV cannot open it ({error})") from error
    with container:
        if not container.streams.audio:
            raise NoSoundError("it has no sound track")
        try:
            yield SoundTrack(name, container)
        except av.FFmpegError as error:
            raise NoSoundError(f"its sound track is damaged ({error})") from error
