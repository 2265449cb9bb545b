"""How audio is read: the settings that all datasets and data modules share."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ask_lightning.utilities.arguments import check_choice, check_count, check_range

Crop = Literal["random", "center", "full"]
Check = Literal["header", "decode", "none"]
Features = Literal["log_mel"]


@dataclass(frozen=True)
class AudioOptions:
    """How the audio of a dataset is read.

    Args:
        sample_rate: Rate of the waveforms in Hz. Recordings of other rates are resampled.
        seconds: Length of a crop, and the longest that a waveform may be.
        crop: `"random"` or `"center"`: waveforms of exactly `seconds`; shorter clips are padded with silence
            at the end. `"full"`: the whole clip, or the middle of one longer than `seconds`; batches are
            padded.
        features: None: items hold the waveform. `"log_mel"`: items hold its log-mel spectrogram instead,
            with frames every 16 ms. Spectrograms are computed from whole clips and then cropped, so that a
            cache keeps them.
        num_mels: Number of mel bins of the spectrogram.
        seed: Seed of the random crops, at least 0.
        strict: Whether a file that cannot be used is an error, or left out with a warning.
        check: How files are examined when the dataset is made. `"header"`: each file is opened. `"decode"`:
            each file is read to its end, which finds damaged files and fills the cache. `"none"`: not at
            all.
        cache: Where decoded audio is kept. None: nowhere. `"memory"`: in this process; workers of a loader
            lose theirs after each epoch unless `check="decode"` fills the memory before they start. Any
            other text or path: a folder, shared by all processes and runs.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> AudioOptions(sample_rate=16000, seconds=2.5).num_samples
        40000
    """

    sample_rate: int = 32000
    seconds: float = 10.0
    crop: Crop = "center"
    features: Features | None = None
    num_mels: int = 64
    seed: int = 0
    strict: bool = False
    check: Check = "header"
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        check_count("sample_rate", self.sample_rate)
        check_range("seconds", self.seconds, 1 / self.sample_rate)
        if math.isinf(self.seconds):
            raise ValueError(
                f"Argument `seconds` has to be finite, but got {self.seconds}. For whole clips pass the "
                "length of the longest."
            )
        check_choice("crop", self.crop, get_args(Crop))
        check_choice("features", self.features, (None, *get_args(Features)))
        check_count("num_mels", self.num_mels)
        check_count("seed", self.seed, 0)
        check_choice("check", self.check, get_args(Check))
        if self.features is not None and self.crop == "full":
            raise ValueError(
                'Argument `crop` has to be "random" or "center" with `features`, but got "full": the padding '
                "of a batch would not be silence."
            )

    @property
    def num_samples(self) -> int:
        """Number of samples of a crop."""
        return round(self.seconds * self.sample_rate)
