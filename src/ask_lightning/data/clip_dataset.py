"""Clips with captions as a dataset. Axes: `T` samples, `F` frames."""

import copy
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from ask_lightning.data.audio.cache import AudioCache
from ask_lightning.data.audio.decoding import (
    AudioFileError,
    Recording,
    check_recording,
    crop_step,
    read_segment,
    resampled_length,
)
from ask_lightning.data.audio.features import SILENCE, log_mel, num_frames
from ask_lightning.data.audio.options import AudioOptions, Crop
from ask_lightning.data.audio.stores import AudioStore
from ask_lightning.data.caption_style import CaptionStyle, style_clips
from ask_lightning.data.clips import Clip
from ask_lightning.utilities.arguments import check_choice
from ask_lightning.utilities.clip_ids import integer_ids

# Clips up to this length are kept whole, and any crop can be cut from them. Of longer clips only those crops
# are kept that are the same in every epoch.
_MAX_SECONDS_KEPT_WHOLE = 60
_SHORTEST_SECONDS = 0.032
_REASONS_SHOWN = 5


class ClipDataset(Dataset[dict[str, Any]]):
    """Captioned clips as mono audio of one rate, with an item for each pair of clip and caption.

    Items hold `"waveform"` `(T,)`, `"num_samples"`, the length of the audio without its padding, `"caption"`,
    `"clip_id"`, which is the same for all captions of a recording, and `"caption_id"`, which tells the items
    of a recording apart. Both are the same in every dataset, whatever other clips and captions it has.
    With `features="log_mel"` they hold `"log_mel"` `(F, num_mels)` in place of the first two.

    Channels are averaged and other rates resampled. Only the wanted part of a long recording is read. A
    random crop depends on the seed, the epoch and the index alone, neither on the state of a random generator
    nor on the number of workers; `set_epoch` moves on to other crops.

    **Files that cannot be used** are left out with one warning when the dataset is made, or are an error if
    `audio.strict`; `audio.check` says how closely files are examined. A file that turns out to be bad later
    is an `AudioFileError`: silence or another clip in its place would teach the model a wrong pair.

    Args:
        clips: The clips with their captions.
        store: Store that opens the audio of each clip.
        audio: Settings by which the audio is read. None: `AudioOptions()`.
        caption_style: `"raw"` for captions as they are, `"plain"` for lower case without punctuation; see
            `ask_lightning.data.plain_caption`.

    Attributes:
        clips: The clips in use, with their captions in this style.
        listed: The clips that were passed, with those that were left out.
        skipped: Key and reason of each clip that was left out.

    Raises:
        AudioFileError: No clip can be used, or one cannot and `audio.strict` is set.
        ValueError: The style is unknown.

    Examples:
        >>> from ask_lightning.data.audio.stores import FileStore
        >>> import soundfile
        >>> folder = getfixture("tmp_path")
        >>> soundfile.write(folder / "a.wav", np.zeros((44100, 2)), 44100)
        >>> clips = [Clip("file:a", ("silence", "nothing"), name="a.wav")]
        >>> data = ClipDataset(clips, FileStore(folder, {"file:a": "a.wav"}), AudioOptions(seconds=2))
        >>> len(data), data[1]["waveform"].shape, data[1]["num_samples"], data[1]["caption"]
        (2, torch.Size([64000]), 32000, 'nothing')
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        store: AudioStore,
        audio: AudioOptions | None = None,
        *,
        caption_style: CaptionStyle = "raw",
    ) -> None:
        check_choice("caption_style", caption_style, get_args(CaptionStyle))
        self.audio = AudioOptions() if audio is None else audio
        self.caption_style: CaptionStyle = caption_style
        self._store = store
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._cache = AudioCache(self.audio.cache)
        self._lengths: dict[str, tuple[int, int]] = {}
        self.listed = list(clips)
        self.skipped: dict[str, str] = {}
        if self.audio.check != "none":
            self._examine(clips)
        self._set_clips([clip for clip in clips if clip.key not in self.skipped])

    def variant(
        self,
        *,
        crop: Crop | None = None,
        seconds: float | None = None,
        seed: int | None = None,
        clips: Sequence[Clip] | None = None,
    ) -> "ClipDataset":
        """A copy with other crops, fewer clips or other captions. Files are not examined again.

        Args:
            crop: Place of the crops, see `AudioOptions`. None: that of this dataset.
            seconds: Length of the crops in seconds. None: that of this dataset.
            seed: Seed of random crops, at least 0. None: that of this dataset.
            clips: Clips of the result: clips of this dataset, whose captions may differ. Clips that this
                dataset does not have are left out. None: all clips of this dataset.

        Returns:
            A dataset that shares the store and the cache with this one.

        Raises:
            ValueError: An argument is outside its range.
        """
        other = copy.copy(self)
        other._epoch = self._epoch.clone()
        other.audio = replace(
            self.audio,
            crop=self.audio.crop if crop is None else crop,
            seconds=self.audio.seconds if seconds is None else seconds,
            seed=self.audio.seed if seed is None else seed,
        )
        usable = {clip.key for clip in self.clips}
        other._set_clips(self.clips if clips is None else [clip for clip in clips if clip.key in usable])
        return other

    def of_items(self, items: Sequence[int]) -> "ClipDataset":
        """A copy with some of the items alone. The result numbers them anew, clip by clip.

        Args:
            items: Numbers of the items, at least one.
        """
        captions: dict[int, list[str]] = {}
        for number, caption in (self._items[item] for item in sorted(set(items))):
            captions.setdefault(number, []).append(self.clips[number].captions[caption])
        chosen = [replace(self.clips[number], captions=tuple(texts)) for number, texts in captions.items()]
        return self.variant(clips=chosen)

    def without_random_crops(self) -> "ClipDataset":
        """This dataset, with center crops if its own are random."""
        return self.variant(crop="center") if self.audio.crop == "random" else self

    def open(self, clip: Clip) -> AbstractContextManager[Recording]:
        """Open the audio of a clip for reading.

        Args:
            clip: One of `clips`.

        Raises:
            AudioFileError: It cannot be read.
        """
        return self._store.open(clip)

    def origin(self, clip: Clip) -> tuple[Path, str]:
        """The file that holds the audio of a clip, and the place in it if it holds several clips.

        Args:
            clip: One of `clips`.
        """
        return self._store.origin(clip)

    def set_epoch(self, epoch: int) -> None:
        """Move on to the random crops of another epoch.

        Args:
            epoch: Number of the epoch, counted from 0.
        """
        # In memory that workers share, which live on from epoch to epoch with `persistent_workers=True`.
        self._epoch.share_memory_().fill_(epoch)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)  # of NumPy's and torch's integers, which a `Subset` may hold
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is outside the {len(self)} items of this dataset.")
        number, caption = self._items[index]
        sound = self._load_sound(number, index)
        text = {
            "caption": self.clips[number].captions[caption],
            "clip_id": self._clip_ids[number],
            "caption_id": _caption_id(self.clips[number], caption),
        }
        # Padding makes a copy in any case: the sound itself serves the next caption of the clip.
        if self.audio.features is not None:
            missing = num_frames(self.audio.num_samples, self.audio.sample_rate) - len(sound)
            return {"log_mel": F.pad(sound, (0, 0, 0, missing), value=SILENCE), **text}
        missing = 0 if self.audio.crop == "full" else self.audio.num_samples - len(sound)
        return {"waveform": F.pad(sound, (0, missing)), "num_samples": len(sound), **text}

    def _set_clips(self, clips: Sequence[Clip]) -> None:
        """Take clips into use, and list an item for each of their captions."""
        self.clips = style_clips(clips, self.caption_style)
        if not self.clips:
            raise AudioFileError(f"No clip is left that can be used. {_describe_skipped(self.skipped)}")
        self._items = [
            (number, caption)
            for number, clip in enumerate(self.clips)
            for caption in range(len(clip.captions))
        ]
        self._clip_ids: list[int] = integer_ids([clip.recording for clip in self.clips]).tolist()
        # The captions of a clip follow each other in evaluation: the clip is decoded for the first of them.
        self._last: tuple[int, Tensor] | None = None

    def _examine(self, clips: Sequence[Clip]) -> None:
        """Look at the audio of each clip and note in `skipped` why it cannot be used."""
        decode = self.audio.check == "decode"
        for clip in clips:
            try:
                with self._store.open(clip) as recording:
                    check_recording(recording, samples=decode)
                    self._lengths[clip.key] = recording.frames, recording.rate
                if decode and self._cache.active and self._is_short(clip):
                    self._load_whole(clip)
            except AudioFileError as error:
                if self.audio.strict:
                    raise
                self.skipped[clip.key] = str(error)
        if 0 < len(self.skipped) < len(clips):
            rank_zero_warn(
                f"Left out {len(self.skipped)} clips whose audio cannot be used. "
                f"{_describe_skipped(self.skipped)} Pass `strict=True` to make this an error."
            )

    def _load_sound(self, number: int, index: int) -> Tensor:
        """The crop of a clip without padding: `(T,)`, or `(F, num_mels)` for log-mel spectrograms."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        clip = self.clips[number]
        try:
            sound = self._load_crop(clip, index)
        except FileNotFoundError as error:
            raise AudioFileError(
                f"{error.filename}: the file was there at the start and does not exist any more."
            ) from error
        if self.audio.crop != "random":
            self._last = number, sound
        return sound

    def _load_crop(self, clip: Clip, index: int) -> Tensor:
        """The crop for an item, from the whole clip or from a cache where that saves decoding."""
        audio = self.audio
        short = self._is_short(clip)
        if audio.features is not None and short:
            whole = self._load_whole(clip)  # (F, num_mels)
            start, count = self._place_crop(
                len(whole), num_frames(audio.num_samples, audio.sample_rate), 1, index
            )
            return whole[start : start + count].clone()
        frames, rate = self._frames_and_rate(clip)
        total = resampled_length(frames, rate, audio.sample_rate)
        start, count = self._place_crop(total, audio.num_samples, crop_step(rate, audio.sample_rate), index)
        if self._cache.active and short:
            whole = self._load_whole(clip)  # (T,), less than `total` of an mp3 with a wrong length
            start = max(0, min(start, len(whole) - count))
            # A view of a cached clip would hand its whole memory to a worker's queue.
            return whole[start : start + count].clone()
        if audio.crop == "random":
            return self._read(clip, start, count)
        return self._load_cached(clip, f"start={start} count={count}", lambda: self._read(clip, start, count))

    def _place_crop(self, total: int, wanted: int, step: int, index: int) -> tuple[int, int]:
        """Start and length of a crop. Starts are multiples of `step`."""
        num_places = max(0, total - wanted) // step + 1
        place = (num_places - 1) // 2
        if self.audio.crop == "random":
            draw = np.random.SeedSequence([self.audio.seed, int(self._epoch), index]).generate_state(1)[0]
            place = int(draw) % num_places
        return place * step, min(wanted, total)

    def _load_whole(self, clip: Clip) -> Tensor:
        return self._load_cached(clip, "whole", lambda: self._read(clip, 0, None), mapped=True)

    def _load_cached(
        self, clip: Clip, part: str, read: Callable[[], Tensor], *, mapped: bool = False
    ) -> Tensor:
        """A part of a clip from the cache; what is not there yet is read and cached."""
        path, place_in_file = self._store.origin(clip)
        features = "" if self.audio.features is None else f" {self.audio.features}={self.audio.num_mels}"
        settings = f"{place_in_file} rate={self.audio.sample_rate}{features} {part}"
        return self._cache.get(path, settings, read, mapped=mapped)

    def _read(self, clip: Clip, start: int, count: int | None) -> Tensor:
        """Decode a part of a clip, and compute its features if there are any."""
        audio = self.audio
        with self._store.open(clip) as recording:
            if (recording.frames, recording.rate) != self._frames_and_rate(clip):
                raise AudioFileError(f"{recording.name}: the file has changed since the start. Start anew.")
            waveform = read_segment(recording, audio.sample_rate, start, count)
        if audio.features is None:
            return waveform
        # The transform mirrors half a window at either end, for which a shorter clip has too few samples.
        missing = max(0, round(_SHORTEST_SECONDS * audio.sample_rate) - len(waveform))
        return log_mel(F.pad(waveform, (0, missing)), sample_rate=audio.sample_rate, num_mels=audio.num_mels)

    def _frames_and_rate(self, clip: Clip) -> tuple[int, int]:
        """Samples and rate of a recording, remembered so that a cached one need not be opened."""
        if clip.key not in self._lengths:
            with self._store.open(clip) as recording:
                check_recording(recording, samples=False)
                self._lengths[clip.key] = recording.frames, recording.rate
        return self._lengths[clip.key]

    def _is_short(self, clip: Clip) -> bool:
        """Whether a clip is short enough to be kept whole."""
        frames, rate = self._frames_and_rate(clip)
        return frames <= _MAX_SECONDS_KEPT_WHOLE * rate


def _caption_id(clip: Clip, number: int) -> int:
    """The id of a caption by its clip and its text; of repeated texts, by which of them it is."""
    text = clip.captions[number]
    before = clip.captions[:number].count(text)
    return int(integer_ids([f"{clip.key}\n{before}\n{text}"]))


def _describe_skipped(skipped: dict[str, str]) -> str:
    reasons = list(skipped.values())
    more = f" And {len(reasons) - _REASONS_SHOWN} more." if len(reasons) > _REASONS_SHOWN else ""
    return " ".join(reasons[:_REASONS_SHOWN]) + more
