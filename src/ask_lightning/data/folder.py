"""Any folder of audio files as a dataset for retrieval. Axes: `T` samples, `F` frames."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from ask_lightning.data.audio.cache import AudioCache
from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.audio.features import SILENCE, log_mel, num_frames
from ask_lightning.data.captions import CaptionedFile
from ask_lightning.utilities.optional_imports import import_optional

# The length in the header of an mp3 is an estimate; a file with less than this share of it is damaged.
_SMALLEST_SHARE = 0.9
_NAMES_SHOWN = 5


class AudioFolder(Dataset[dict[str, Any]]):
    """Audio files with captions, as mono clips of one rate and length.

    Everything that soundfile reads: wav, flac, ogg, mp3. Channels are averaged, other rates resampled,
    longer files cropped (at random if `train`, else the middle) and shorter ones filled up with silence
    at the end. A random crop depends on `seed`, the epoch and the index alone: neither on the state of any
    random generator nor on the number of workers. `set_epoch` moves on to other crops.

    **Files that cannot be used.** The header of every file is read at construction. Those that are
    missing, empty or not audio are left out, and one warning says how many and which; with `strict=True`
    they are an error. A damaged file may still have a good header. `check="decode"` decodes every file
    once, which fills the cache if there is one, and leaves out those as well. With `check="header"` such a
    file is an `AudioFileError` when it is read: putting silence or another clip in its place would teach
    the model a wrong pair, and a shorter batch would break a run on several devices.

    Args:
        folder: Where the files are.
        pairs: What `read_captions` returns, or any other list of captioned files.
        sample_rate: Of the clips, in Hz.
        seconds: Length of the clips.
        num_mels: None: items hold the waveform. A number: they hold its log-mel spectrogram with so many
            bins instead.
        train: Whether to crop at random.
        seed: Of the random crops, at least 0.
        strict: Whether a file that cannot be used is an error.
        check: `"header"` or `"decode"`: how files are examined at construction.
        cache: Where whole decoded files, or their spectrograms, are kept. None: nowhere. `"memory"`: in
            this process, as they are read; the workers of a loader forget theirs after each epoch unless
            `check="decode"` fills the memory before they start. A folder: shared by all processes and runs.

    Attributes:
        pairs: The pairs in use.
        skipped: Path and reason of each file that was left out.

    Raises:
        FileNotFoundError: There is no such folder.
        AudioFileError: No file can be used, or with `strict` any cannot.
        ImportError: soundfile is missing, or torchaudio where it is needed.

    Examples:
        >>> import soundfile
        >>> folder = getfixture("tmp_path")
        >>> soundfile.write(folder / "a.wav", np.zeros((22050, 2)), 22050)
        >>> clips = AudioFolder(folder, [CaptionedFile("a.wav", "silence", clip_id=0)], seconds=2)
        >>> clips[0]["waveform"].shape
        torch.Size([32000])
    """

    def __init__(
        self,
        folder: str | Path,
        pairs: Sequence[CaptionedFile],
        *,
        sample_rate: int = 16000,
        seconds: float = 10.0,
        num_mels: int | None = None,
        train: bool = False,
        seed: int = 0,
        strict: bool = False,
        check: Literal["header", "decode"] = "header",
        cache: Literal["memory"] | str | Path | None = None,
    ) -> None:
        if sample_rate < 1:
            raise ValueError(f"Argument `sample_rate` has to be positive, but got {sample_rate}.")
        if seconds * sample_rate < 1:
            raise ValueError(f"Argument `seconds` has to be at least one sample long, but got {seconds}.")
        if seed < 0:
            raise ValueError(f"Argument `seed` has to be at least 0, but got {seed}.")
        if check not in ("header", "decode"):
            raise ValueError(f"Argument `check` has to be 'header' or 'decode', but got {check!r}.")
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"There is no folder of audio files at {self._folder}.")
        self._sample_rate = sample_rate
        self._num_samples = int(seconds * sample_rate)
        self._num_mels = num_mels
        self._train = train
        self._seed = seed
        self._epoch = 0
        self._cache = AudioCache(cache)
        self.skipped = self._examine(dict.fromkeys(pair.filename for pair in pairs), check, strict)
        self.pairs = [pair for pair in pairs if pair.filename not in self.skipped]
        if not self.pairs:
            raise AudioFileError(f"{self._folder}: no audio file can be used. {_describe(self.skipped)}")
        if self.skipped:
            rank_zero_warn(
                f"{self._folder}: left out {len(self.skipped)} of the audio files. {_describe(self.skipped)} "
                "Pass `strict=True` to make this an error."
            )

    def part(self, indices: Iterable[int], *, train: bool) -> "AudioFolder":
        """Some of the items as a dataset of their own, which shares the cache with this one.

        Args:
            indices: Which items.
            train: Whether the part crops at random.

        Returns:
            The part. The files are not examined again.
        """
        part = copy.copy(self)
        part.pairs = [self.pairs[index] for index in indices]
        part._train = train
        return part

    def set_epoch(self, epoch: int) -> None:
        """Move on to the random crops of another epoch.

        Args:
            epoch: Counted from 0.
        """
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Index {index} is outside the {len(self)} items of this dataset.")
        pair = self.pairs[index]
        sound = self._cut(self._load(pair.filename), index)
        key = "waveform" if self._num_mels is None else "log_mel"
        return {key: sound, "caption": pair.caption, "clip_id": pair.clip_id}

    def _examine(self, filenames: Iterable[str], check: str, strict: bool) -> dict[str, str]:
        """Why each file that cannot be used cannot."""
        reasons: dict[str, str] = {}
        for filename in filenames:
            try:
                _check_header(self._folder / filename)
                if check == "decode":
                    self._load(filename)
            except AudioFileError as error:
                if strict:
                    raise
                reasons[filename] = str(error)
        return reasons

    def _load(self, filename: str) -> Tensor:
        """The whole file: `(T,)`, or `(F, num_mels)`."""
        path = self._folder / filename

        def compute() -> Tensor:
            waveform = _decode(path, self._sample_rate)  # (T,)
            if self._num_mels is None:
                return waveform
            return log_mel(waveform, sample_rate=self._sample_rate, num_mels=self._num_mels)

        if not path.is_file():
            raise AudioFileError(f"{path}: the file was there at the start and does not exist any more.")
        return self._cache.get(path, f"rate={self._sample_rate} mels={self._num_mels}", compute)

    def _cut(self, sound: Tensor, index: int) -> Tensor:
        """Crop or fill up along time, whether in samples or in frames."""
        length, filling = self._num_samples, 0.0
        if self._num_mels is not None:
            length, filling = num_frames(self._num_samples, self._sample_rate), SILENCE
        surplus = len(sound) - length
        if surplus <= 0:
            missing = (0, 0) * (sound.dim() - 1) + (0, -surplus)
            return F.pad(sound, missing, value=filling)
        start = surplus // 2
        if self._train:
            draw = np.random.SeedSequence([self._seed, self._epoch, index]).generate_state(1)[0]
            start = int(draw) % (surplus + 1)
        # A view of a cached file would hand its whole memory to a worker's queue.
        return sound[start : start + length].clone()


def _check_header(path: Path) -> None:
    soundfile = import_optional("soundfile")
    if not path.is_file():
        raise AudioFileError(f"{path}: the file does not exist. Correct its name or remove its rows.")
    if path.stat().st_size == 0:
        raise AudioFileError(f"{path}: the file is empty. Replace it or remove its rows.")
    try:
        header = soundfile.info(str(path))
    except soundfile.SoundFileError as error:
        raise AudioFileError(
            f"{path}: not an audio file that soundfile can read ({error}). Convert it, or remove its rows."
        ) from error
    if header.frames == 0:
        raise AudioFileError(f"{path}: the file holds no samples. Replace it or remove its rows.")


def _decode(path: Path, sample_rate: int) -> Tensor:
    """The whole file, mono and resampled: `(T,)` float32."""
    soundfile = import_optional("soundfile")
    remedy = 'Replace it, or pass `check="decode"` to find and leave out all such files at the start.'
    try:
        with soundfile.SoundFile(str(path)) as file:
            promised, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # (T, channels)
    except soundfile.SoundFileError as error:
        raise AudioFileError(f"{path}: the file is damaged ({error}). {remedy}") from error
    if len(samples) < _SMALLEST_SHARE * promised:
        raise AudioFileError(
            f"{path}: the file is damaged: {len(samples)} of {promised} samples can be read. {remedy}"
        )
    if not np.isfinite(samples).all():
        raise AudioFileError(f"{path}: the file holds samples that are NaN or infinite. {remedy}")
    waveform = torch.from_numpy(samples.mean(axis=1))  # (T,)
    if rate != sample_rate:
        resample = import_optional("torchaudio.functional").resample
        waveform = resample(waveform, rate, sample_rate)
    return waveform


def _describe(skipped: dict[str, str]) -> str:
    reasons = list(skipped.values())
    more = f" And {len(reasons) - _NAMES_SHOWN} more." if len(reasons) > _NAMES_SHOWN else ""
    return " ".join(reasons[:_NAMES_SHOWN]) + more
