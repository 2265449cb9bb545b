"""Log-mel spectrograms, and the two outer packages that audio needs. Axes: `T` samples, `F` frames."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ask_lightning.utilities.optional_imports import import_optional

_WINDOW_SECONDS = 0.032
_HOP_SECONDS = 0.016
_FLOOR = 1e-5

SILENCE = math.log(_FLOOR)
"""The value of every bin of a log-mel spectrogram where nothing sounds."""


def log_mel(waveform: Tensor, *, sample_rate: int = 16000, num_mels: int = 64) -> Tensor:
    """Log-mel spectrogram with windows of 32 ms every 16 ms.

    Computed in float32 whatever autocast is active.

    Args:
        waveform: `(..., T)` mono audio.
        sample_rate: In Hz.
        num_mels: Number of mel bins between 50 Hz and half the sample rate.

    Returns:
        `(..., F, num_mels)` natural logarithm of power, `F = num_frames(T)`, at least `SILENCE`.

    Raises:
        ImportError: torchaudio is missing or does not load.

    Examples:
        >>> log_mel(torch.zeros(2, 16000)).shape
        torch.Size([2, 63, 64])
    """
    with torch.autocast(waveform.device.type, enabled=False):
        power = _spectrogram(sample_rate, num_mels, waveform.device)(waveform.float())  # (..., num_mels, F)
        logarithm: Tensor = power.clamp_min(_FLOOR).log().transpose(-1, -2)  # (..., F, num_mels)
    return logarithm


def num_frames(num_samples: int, sample_rate: int = 16000) -> int:
    """How many frames `log_mel` makes of so many samples.

    Args:
        num_samples: Length of the waveform.
        sample_rate: In Hz.

    Examples:
        >>> num_frames(16000)
        63
    """
    return num_samples // _samples(_HOP_SECONDS, sample_rate) + 1


# Not a module of the model: its window and filters would enter every checkpoint.
@lru_cache(maxsize=8)
def _spectrogram(sample_rate: int, num_mels: int, device: torch.device) -> Any:
    transforms = import_optional("torchaudio.transforms")
    transform = transforms.MelSpectrogram(
        sample_rate=sample_rate,
        n_fft=_samples(_WINDOW_SECONDS, sample_rate),
        hop_length=_samples(_HOP_SECONDS, sample_rate),
        f_min=50.0,
        n_mels=num_mels,
    )
    return transform.to(device)


def _samples(seconds: float, sample_rate: int) -> int:
    return round(seconds * sample_rate)
