"""Reads parts of audio files, mono and at one rate. Axes: `T` samples, `C` channels."""

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ask_lightning.data.audio.media import MEDIA_SUFFIXES, NoSoundError, open_sound_track
from ask_lightning.data.audio.near_names import near_file
from ask_lightning.utilities.optional_imports import import_optional

Samples = npt.NDArray[np.float32]

# The length in the header of an mp3 is an estimate; a file with less than this share of it is damaged.
_SMALLEST_SHARE = 0.9
# In the log of libsndfile: what a wav, aiff, au, rf64 or w64 file says of its length, and what there is.
_CUT_SHORT = re.compile(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)")
# Writers that cannot go back to the header leave a length of 2 GiB or more there.
_UNKNOWN_BYTES = 0x7FFF0000
_UNKNOWN_FRAMES = 1 << 62
# A frame of an mp3 takes up to 511 bytes from those before it, and one of Vorbis overlaps with the one
# before. After a seek libsndfile has not read these and decodes silence or noise: at the lowest bit rates of
# an mp3, 23 frames of 576 samples.
_LEAD = 16384
# The last page of an Ogg file ends with the audio, before its last block does. After a seek into it
# libsndfile is off by the rest of that block. It holds up to 255 packets, of Vorbis mostly of 1024 samples.
_LAST_PAGE = 1 << 18
_LARGEST_PAGE = 65307  # bytes of a page of an Ogg file
# Headers that are wrong by the padding or by their own length are common; files cut by so little are, too.
_SMALLEST_SHARE_OF_BYTES = 0.99
# Integers of 32 bits as floating-point numbers stay below; the power of louder samples overflows float32.
_LOUDEST = 1e10
# Samples to each side on which the resampling filters depend, in samples of the lower rate.
_FILTER_REACH = 11
# torchaudio computes as many numbers as both rates without their common factor multiply to, for each clip: of
# 22,254 Hz, once the rate of the Macintosh, 178 million.
_MOST_FILTER_TAPS = 1 << 20
_SAMPLES_PER_CHECK = 1_000_000
_REMEDY = 'Replace it; datasets with `check="decode"` find and leave out all such files at the start.'


class AudioFileError(ValueError):
    """An audio file cannot be used. The message names it, says why, and what to do."""


class Recording(Protocol):
    """Audio that is open for reading.

    Attributes:
        name: Name of the file, for errors.
        frames: Length in samples at the recording's own rate, according to its header.
        rate: The recording's own rate in Hz.
    """

    name: str
    frames: int
    rate: int

    def read(self, start: int, count: int) -> Samples:
        """Read a range of samples.

        Args:
            start: Index of the first sample, at the recording's own rate.
            count: Number of samples.

        Returns:
            `(T, C)` float32 with `T` at most `count`: less where the recording ends.
        """
        ...


class ArrayRecording:
    """Mono samples in an array, in memory or on disk.

    Args:
        name: Name of the recording, for errors.
        samples: `(T,)` floating-point numbers in [-1, 1], or integers that are scaled to this range.
        frames: Number of samples that are audio; the rest is padding.
        rate: Rate of the samples in Hz.

    Examples:
        >>> ArrayRecording("a", np.array([0, 16384], dtype=np.int16), frames=2, rate=16000).read(1, 5)
        array([[0.5]], dtype=float32)
    """

    def __init__(self, name: str, samples: npt.NDArray[np.generic], frames: int, rate: int) -> None:
        self.name = name
        self.frames = frames
        self.rate = rate
        self._samples = samples

    def read(self, start: int, count: int) -> Samples:
        """Read a range of samples; see `Recording`."""
        part = np.asarray(self._samples[start : min(start + count, self.frames)])
        scale = 1.0 if part.dtype.kind == "f" else -float(np.iinfo(part.dtype).min)
        return (part.astype(np.float32) / np.float32(scale))[:, None]  # (T, 1)


class _SoundFile:
    """A file that soundfile has opened, as a `Recording`."""

    def __init__(self, name: str, file: Any) -> None:
        self.name = name
        self.frames: int = file.frames
        self.rate: int = file.samplerate
        self._file = file
        self._lead = _LEAD if file.format in ("MP3", "OGG") else 0
        self._last_seek = self.frames - (_LAST_PAGE if file.format == "OGG" else 0)

    def read(self, start: int, count: int) -> Samples:
        # In one call: after each, soundfile seeks to where it has stopped.
        lead = start - max(0, min(start - self._lead, self._last_seek))
        if self._file.tell() != start - lead:
            self._file.seek(start - lead)
        samples: Samples = self._file.read(lead + count, dtype="float32", always_2d=True)
        return samples[lead:]


@contextmanager
def open_audio(name: str, content: Path | bytes) -> Iterator[Recording]:
    """Open audio: by soundfile wav, flac, ogg and mp3; by PyAV the sound track of m4a, mp4, webm and others.

    Args:
        name: Name of the audio, for errors.
        content: Path of a file, or the bytes of one.

    Raises:
        AudioFileError: There is nothing to read, it is damaged or was cut short, or does not say its length.
        ImportError: soundfile is missing, or PyAV for a file that only it reads.

    Examples:
        >>> import soundfile
        >>> path = getfixture("tmp_path") / "a.wav"
        >>> soundfile.write(path, np.zeros((22050, 2)), 22050)
        >>> with open_audio("a.wav", path) as recording:
        ...     recording.frames, recording.read(22000, 100).shape
        (22050, (50, 2))
    """
    soundfile = import_optional("soundfile")
    if isinstance(content, Path) and not _is_file(name, content):
        near = near_file(content)
        if content.is_dir():
            raise AudioFileError(f"{name}: a folder, not an audio file. Name a file in it.")
        hint = "" if near is None else f"There is {near}, which differs in capitals, signs or Unicode form. "
        raise AudioFileError(f"{name}: the file does not exist. {hint}Correct its name or remove its rows.")
    if not (len(content) if isinstance(content, bytes) else content.stat().st_size):
        raise AudioFileError(f"{name}: the file is empty. Replace it or remove its rows.")
    try:
        file = soundfile.SoundFile(io.BytesIO(content) if isinstance(content, bytes) else _name_of(content))
    except (soundfile.SoundFileError, TypeError) as error:  # a TypeError if the ending is .raw
        if not _is_media(content):
            raise AudioFileError(
                f"{name}: not an audio file that soundfile can read ({error}). Convert it, or remove its "
                "rows."
            ) from error
        file = None
    if file is None:
        try:
            with open_sound_track(name, content) as track:
                yield track
        except NoSoundError as error:
            raise AudioFileError(f"{name}: {error}. {_REMEDY}") from error
        return
    with file:
        _check_length(name, file)
        if file.format == "OGG":
            _check_pages(name, content)
        try:
            if file.seekable():
                yield _SoundFile(name, file)
            else:  # as GSM in a wav, the format of telephones
                samples = file.read(file.frames, "float32", always_2d=True).mean(axis=1)  # (T,)
                yield ArrayRecording(name, samples, file.frames, file.samplerate)
        except soundfile.SoundFileError as error:
            raise AudioFileError(f"{name}: the file is damaged ({error}). {_REMEDY}") from error


def check_recording(recording: Recording, *, samples: bool) -> None:
    """Raise if a recording is empty or, if its samples are read, damaged.

    Args:
        recording: Recording that is open for reading.
        samples: Whether to read the recording to its end.

    Raises:
        AudioFileError: It has no samples, ends long before its header says, or holds what is no audio.

    Examples:
        >>> check_recording(ArrayRecording("a", np.zeros(1), frames=1, rate=16000), samples=True)
    """
    if recording.frames == 0:
        raise AudioFileError(f"{recording.name}: the file holds no samples. Replace it or remove its rows.")
    position = 0
    while samples and position < recording.frames:
        piece = recording.read(position, _SAMPLES_PER_CHECK)
        _check_samples(recording, piece)
        position += len(piece)
        if not len(piece):
            _check_end(recording, position)
            break


def resampled_length(frames: int, rate: int, sample_rate: int) -> int:
    """Number of samples of a recording after resampling.

    Args:
        frames: Number of samples before.
        rate: Rate before in Hz.
        sample_rate: Rate after in Hz.

    Examples:
        >>> resampled_length(441, 44100, 32000)
        320
    """
    return math.ceil(frames * sample_rate / rate)


def crop_step(rate: int, sample_rate: int) -> int:
    """The smallest distance between starts of crops that is a whole number of samples at both rates.

    Args:
        rate: Rate of the recording in Hz.
        sample_rate: Rate of the crops in Hz.

    Returns:
        The distance in samples of the crops.

    Examples:
        >>> crop_step(44100, 32000), crop_step(96000, 32000)
        (320, 1)
    """
    return sample_rate // math.gcd(rate, sample_rate)


def read_segment(recording: Recording, sample_rate: int, start: int = 0, count: int | None = None) -> Tensor:
    """Read a part of a recording, mono and resampled.

    Only the samples that are needed are read. Up to rounding the result equals the same part of the whole
    recording after resampling.

    Args:
        recording: Recording that is open for reading.
        sample_rate: Rate of the result in Hz.
        start: Index of the first sample at that rate, a multiple of `crop_step`.
        count: Number of samples at that rate. None: all up to the end.

    Returns:
        `(T,)` float32, `T = count` or less where the recording ends.

    Raises:
        AudioFileError: It is damaged, or holds samples that are NaN, infinite or larger than 1e10.
        ImportError: torchaudio is missing and the rates differ.

    Examples:
        >>> tone = ArrayRecording("a", np.ones(44100), frames=44100, rate=44100)
        >>> read_segment(tone, 32000, start=320, count=3200).shape
        torch.Size([3200])
    """
    rate = recording.rate
    total = resampled_length(recording.frames, rate, sample_rate)
    count = total - start if count is None else min(count, total - start)
    common = math.gcd(rate, sample_rate)
    block, step = rate // common, sample_rate // common  # resampling turns `block` samples into `step`
    first = start // step * block
    reach = 0 if rate == sample_rate else math.ceil(_FILTER_REACH * max(rate, sample_rate) / sample_rate)
    margin = min(math.ceil(reach / block) * block, first)
    needed = math.ceil(count * rate / sample_rate) + reach
    samples = recording.read(first - margin, margin + needed)  # (T, C)
    expected = min(margin + needed, recording.frames - first + margin)
    if len(samples) < _SMALLEST_SHARE * expected:
        samples, margin = _read_truncated(recording, first, needed), 0
    _check_samples(recording, samples)
    waveform = torch.from_numpy(samples.mean(axis=1))  # (T,)
    if rate != sample_rate:
        waveform = _resample(waveform, block, step)
    skipped = margin // block * step
    return waveform[skipped : skipped + count]


def _resample(waveform: Tensor, block: int, step: int) -> Tensor:
    """Turn each `block` samples of a waveform `(T,)` into `step`."""
    if block * step > _MOST_FILTER_TAPS:
        from scipy.signal import resample_poly

        return torch.from_numpy(resample_poly(waveform.numpy(), step, block))
    resampled: Tensor = import_optional("torchaudio.functional").resample(waveform, block, step)
    return resampled


def _read_truncated(recording: Recording, first: int, needed: int) -> Samples:
    """The wanted samples of a recording that ends before its header says, or its last samples.

    The end is looked for piece by piece, so that a long recording does not have to fit into memory.
    """
    kept = recording.read(0, 0)
    end = 0
    while end < recording.frames:
        piece = recording.read(end, _SAMPLES_PER_CHECK)
        if not len(piece):
            break
        end += len(piece)
        kept = np.concatenate([kept, piece])[-max(needed, end - first) :]
    _check_end(recording, end)
    return kept[:needed]


def _check_end(recording: Recording, end: int) -> None:
    """Refuse a recording that ends at `end`, long before its header says."""
    if end < _SMALLEST_SHARE * recording.frames:
        raise AudioFileError(
            f"{recording.name}: the file is damaged: {end} of {recording.frames} samples can be read. "
            f"{_REMEDY}"
        )


def _name_of(path: Path) -> str | bytes:
    """A path as soundfile takes it: one that is no Unicode, as of another encoding, as bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


def _is_media(content: Path | bytes) -> bool:
    """Whether it looks like a file of a format with a sound track."""
    if isinstance(content, Path):
        return content.suffix.lower() in MEDIA_SUFFIXES
    # MP4 and its kin; Matroska and WebM; ASF (wma).
    return content[4:8] == b"ftyp" or content.startswith((b"\x1aE\xdf\xa3", b"0&\xb2u"))


def _is_file(name: str, path: Path) -> bool:
    """Whether there is a file, and nothing that keeps it from being looked for, such as too long a name."""
    try:
        return path.is_file()
    except OSError as error:
        raise AudioFileError(
            f"{name}: the file cannot be looked for ({error.strerror}). Correct its name or remove its rows."
        ) from error


def _check_length(name: str, file: Any) -> None:
    """Refuse a file that does not say how long it is, and one that says so and has less.

    libsndfile takes what is there for the length and tells of the difference in its log alone.
    """
    if file.frames > _UNKNOWN_FRAMES:
        raise AudioFileError(
            f"{name}: the file does not say how long it is, as files that were written to a pipe. Write it "
            f"anew: `ffmpeg -i {name} other.flac`."
        )
    for promised, present in _CUT_SHORT.findall(file.extra_info):
        if int(present) < _SMALLEST_SHARE_OF_BYTES * int(promised) and int(promised) < _UNKNOWN_BYTES:
            raise AudioFileError(
                f"{name}: the file was cut short: {present} of {promised} bytes of audio are there. {_REMEDY}"
            )


def _check_pages(name: str, content: Path | bytes) -> None:
    """Refuse an Ogg file that ends in the middle of a page, and one that is several streams in a row.

    libsndfile passes over the first, and reads the first stream of the second.

    References:
        RFC 3533, section 6: a page is a header of 27 bytes, the last of which is the number of its segments,
        their lengths in a byte each, and the segments. Bytes 14 to 17 are the number of its stream, whose
        first page has the bit 2 set in byte 5; the first pages of streams side by side stand together.
    """
    if isinstance(content, bytes):
        begin, end = content[:_LARGEST_PAGE], content[-_LARGEST_PAGE:]
    else:
        with content.open("rb") as file:
            begin = file.read(_LARGEST_PAGE)
            file.seek(max(0, content.stat().st_size - _LARGEST_PAGE))
            end = file.read()
    if (start := end.rfind(b"OggS")) < 0:
        return  # something else follows the last page
    page = end[start:]
    promised = 27
    if len(page) >= promised:
        promised += page[26] + sum(page[27 : 27 + page[26]])
    if len(page) < promised:
        raise AudioFileError(
            f"{name}: the file was cut short: {len(page)} of {promised} bytes of its last page are there. "
            f"{_REMEDY}"
        )
    streams = set()
    while begin.startswith(b"OggS") and len(begin) >= 27 and begin[5] & 2:
        streams.add(begin[14:18])
        begin = begin[27 + begin[26] + sum(begin[27 : 27 + begin[26]]) :]
    if page[14:18] not in streams:
        raise AudioFileError(
            f"{name}: the file is several Ogg streams in a row, of which only the first would be heard. "
            f"Write it anew: `ffmpeg -i {name} other.flac`."
        )


def _check_samples(recording: Recording, samples: Samples) -> None:
    """Refuse samples that cannot be those of a sound."""
    if not np.isfinite(samples).all():
        raise AudioFileError(f"{recording.name}: the file holds samples that are NaN or infinite. {_REMEDY}")
    peak = float(np.abs(samples).max(initial=0))
    if peak > _LOUDEST:
        raise AudioFileError(
            f"{recording.name}: the file holds samples of {peak:.0e}, but those of audio lie between -1 and "
            f"1. {_REMEDY}"
        )
