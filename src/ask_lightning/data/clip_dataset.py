"""Clips with captions as a dataset of waveforms. Axes: `T` samples."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from ask_lightning.data.audio.cache import AudioCache
from ask_lightning.data.audio.decoding import (
    AudioFileError,
    check_recording,
    crop_step,
    read_stretch,
    resampled_length,
)
from ask_lightning.data.audio.stores import AudioStore
from ask_lightning.data.clips import Clip
from ask_lightning.utilities.clip_ids import integer_ids

Crop = Literal["random", "center", "full"]
Check = Literal["header", "decode", "none"]

# Clips up to this length are cached whole, for any crop of them; of longer ones only what is always the same.
_CACHED_SECONDS = 60
_SHOWN = 5


class ClipDataset(Dataset[dict[str, Any]]):
    """Captioned clips as mono waveforms of one rate: an item for each clip and caption.

    Channels are averaged and other rates resampled. Of a long recording only the stretch that is wanted is
    read. A random crop depends on `seed`, the epoch and the index alone; `set_epoch` moves on to others.

    **Files that cannot be used.** With `check="header"` every file is opened at construction, and those
    that are empty or not audio are left out with one warning; `check="decode"` also reads each to its end
    and leaves out damaged ones and such with NaN. A file that turns out to be bad later is an
    `AudioFileError`: silence in its place would teach the model a wrong pair.

    Args:
        clips: Which, with their captions.
        store: Where their audio is.
        sample_rate: Of the waveforms, in Hz.
        seconds: Length of a crop, and the longest that a waveform may be.
        crop: `"random"` or `"center"`: waveforms of exactly `seconds`, shorter clips filled up with silence
            at the end. `"full"`: the whole clip, of a longer one the middle; batches are padded.
        seed: Of the random crops, at least 0.
        strict: Whether a file that cannot be used is an error.
        check: `"header"`, `"decode"` or `"none"`: how files are examined at construction.
        cache: Where waveforms are kept: None for nowhere, `"memory"`, or a folder for all processes and runs.

    Attributes:
        clips: The clips in use.
        skipped: Key and reason of each clip that was left out.

    Raises:
        AudioFileError: No clip can be used, or with `strict` any cannot.
        ValueError: An argument is outside its range.

    Examples:
        >>> from ask_lightning.data.audio.stores import FileStore
        >>> import soundfile
        >>> folder = getfixture("tmp_path")
        >>> soundfile.write(folder / "a.wav", np.zeros((44100, 2)), 44100)
        >>> clips = [Clip("file:a", ("silence", "nothing"), name="a.wav")]
        >>> data = ClipDataset(clips, FileStore(folder, {"file:a": "a.wav"}), seconds=2)
        >>> len(data), data[1]["waveform"].shape, data[1]["num_samples"], data[1]["caption"]
        (2, torch.Size([64000]), 32000, 'nothing')
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        store: AudioStore,
        *,
        sample_rate: int = 32000,
        seconds: float = 10.0,
        crop: Crop = "center",
        seed: int = 0,
        strict: bool = False,
        check: Check = "header",
        cache: str | Path | None = None,
    ) -> None:
        if sample_rate < 1:
            raise ValueError(f"Argument `sample_rate` has to be positive, but got {sample_rate}.")
        if seconds * sample_rate < 1:
            raise ValueError(f"Argument `seconds` has to be at least one sample long, but got {seconds}.")
        if seed < 0:
            raise ValueError(f"Argument `seed` has to be at least 0, but got {seed}.")
        _check_choice("crop", crop, Crop)
        _check_choice("check", check, Check)
        self._store = store
        self._sample_rate = sample_rate
        self._num_samples = int(seconds * sample_rate)
        self._crop = crop
        self._seed = seed
        self._epoch = 0
        self._cache = AudioCache(cache)
        self._lengths: dict[str, tuple[int, int]] = {}
        self.skipped: dict[str, str] = {}
        if check != "none":
            self._examine(clips, decode=check == "decode", strict=strict)
        self._use([clip for clip in clips if clip.key not in self.skipped])

    def variant(
        self, *, crop: Crop | None = None, seconds: float | None = None, clips: Sequence[Clip] | None = None
    ) -> "ClipDataset":
        """The same audio cropped otherwise, or with other captions; the files are not examined again.

        Args:
            crop: As at construction. None: as this one.
            seconds: As at construction. None: as this one.
            clips: Some of `clips`, perhaps with other captions; those that this dataset does not have are
                left out. None: all.

        Returns:
            A dataset that shares the store and the cache with this one.

        Raises:
            ValueError: An argument is outside its range.
        """
        other = copy.copy(self)
        if crop is not None:
            _check_choice("crop", crop, Crop)
            other._crop = crop
        if seconds is not None:
            if seconds * self._sample_rate < 1:
                raise ValueError(f"Argument `seconds` has to be at least one sample long, but got {seconds}.")
            other._num_samples = int(seconds * self._sample_rate)
        usable = {clip.key for clip in self.clips}
        other._use(self.clips if clips is None else [clip for clip in clips if clip.key in usable])
        return other

    def set_epoch(self, epoch: int) -> None:
        """Move on to the random crops of another epoch.

        Args:
            epoch: Counted from 0.
        """
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is outside the {len(self)} items of this dataset.")
        number, caption = self._items[index]
        waveform = self._waveform(number, index)
        length = len(waveform)
        # Either way a copy: the waveform itself serves the next caption.
        filling = 0 if self._crop == "full" else self._num_samples - length
        waveform = F.pad(waveform, (0, filling))
        return {
            "waveform": waveform,
            "num_samples": length,
            "caption": self.clips[number].captions[caption],
            "clip_id": self._clip_ids[number],
        }

    def _use(self, clips: Sequence[Clip]) -> None:
        self.clips = list(clips)
        if not self.clips:
            raise AudioFileError(f"No clip is left that can be used. {_describe(self.skipped)}")
        self._items = [
            (number, caption)
            for number, clip in enumerate(self.clips)
            for caption in range(len(clip.captions))
        ]
        self._clip_ids: list[int] = integer_ids([clip.key for clip in self.clips]).tolist()
        # The captions of a clip follow each other in evaluation: the clip is decoded for the first.
        self._last: tuple[int, Tensor] | None = None

    def _examine(self, clips: Sequence[Clip], *, decode: bool, strict: bool) -> None:
        for clip in clips:
            try:
                with self._store.open(clip) as recording:
                    check_recording(recording, samples=decode)
                    self._lengths[clip.key] = recording.frames, recording.rate
                if decode and self._cache.active and self._fits_cache(clip):
                    self._whole(clip)
            except AudioFileError as error:
                if strict:
                    raise
                self.skipped[clip.key] = str(error)
        if 0 < len(self.skipped) < len(clips):
            rank_zero_warn(
                f"Left out {len(self.skipped)} clips whose audio cannot be used. {_describe(self.skipped)} "
                "Pass `strict=True` to make this an error."
            )

    def _waveform(self, number: int, index: int) -> Tensor:
        """What is heard of a clip, not filled up: `(T,)`."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        clip = self.clips[number]
        try:
            waveform = self._stretch(clip, index)
        except FileNotFoundError as error:
            raise AudioFileError(
                f"{error.filename}: the file was there at the start and does not exist any more."
            ) from error
        if self._crop != "random":
            self._last = number, waveform
        return waveform

    def _stretch(self, clip: Clip, index: int) -> Tensor:
        frames, rate = self._length(clip)
        total = resampled_length(frames, rate, self._sample_rate)
        step = crop_step(rate, self._sample_rate)
        places = max(0, total - self._num_samples) // step + 1  # so many places to start at
        place = (places - 1) // 2
        if self._crop == "random":
            draw = np.random.SeedSequence([self._seed, self._epoch, index]).generate_state(1)[0]
            place = int(draw) % places
        start, count = place * step, min(self._num_samples, total)
        if self._cache.active and self._fits_cache(clip):
            # A view of a cached clip would hand its whole memory to a worker's queue.
            return self._whole(clip)[start : start + count].clone()
        if self._crop == "random":
            return self._read(clip, start, count)
        path, place_in_file = self._store.origin(clip)
        settings = f"{place_in_file} rate={self._sample_rate} start={start} count={count}"
        return self._cache.get(path, settings, lambda: self._read(clip, start, count))

    def _whole(self, clip: Clip) -> Tensor:
        path, place_in_file = self._store.origin(clip)
        settings = f"{place_in_file} rate={self._sample_rate} whole"
        return self._cache.get(path, settings, lambda: self._read(clip, 0, None), mapped=True)

    def _read(self, clip: Clip, start: int, count: int | None) -> Tensor:
        with self._store.open(clip) as recording:
            if (recording.frames, recording.rate) != self._length(clip):
                raise AudioFileError(f"{recording.name}: the file has changed since the start. Start anew.")
            return read_stretch(recording, self._sample_rate, start, count)

    def _length(self, clip: Clip) -> tuple[int, int]:
        """Samples and rate of a recording, so that a cached one need not be opened."""
        if clip.key not in self._lengths:
            with self._store.open(clip) as recording:
                check_recording(recording, samples=False)
                self._lengths[clip.key] = recording.frames, recording.rate
        return self._lengths[clip.key]

    def _fits_cache(self, clip: Clip) -> bool:
        frames, rate = self._length(clip)
        return frames <= _CACHED_SECONDS * rate


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        allowed = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"Argument `{name}` has to be one of {allowed}, but got {value!r}.")


def _describe(skipped: dict[str, str]) -> str:
    reasons = list(skipped.values())
    more = f" And {len(reasons) - _SHOWN} more." if len(reasons) > _SHOWN else ""
    return " ".join(reasons[:_SHOWN]) + more
