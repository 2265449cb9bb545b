"""Pictures of sounds. Axes: `T` samples, `F` frames, `M` mel bands."""

import io
from pathlib import Path

import torch
from torch import Tensor

from ask_lightning.data.audio.decoding import check_recording, open_audio, read_segment
from ask_lightning.data.audio.features import log_mel
from ask_lightning.utilities.optional_imports import import_optional

SAMPLE_RATE = 16000
"""Rate in Hz at which sounds are drawn: the picture goes up to half of it."""

LONGEST = 30.0
"""Seconds of a sound that are drawn."""

_DYNAMIC_RANGE = 14.0  # natural logarithm of power: 60 dB
_PIXELS_PER_BAND = 2


def spectrogram_pixels(waveform: Tensor, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Brightness of a log-mel spectrogram, from 0, which is 60 dB or more below the loudest, to 1.

    Args:
        waveform: Mono audio `(T,)`.
        sample_rate: Sample rate of the waveform, in Hz.

    Returns:
        `(M, F)` with the highest band first, all 0 for silence.

    Examples:
        >>> tone = torch.sin(torch.arange(16000) * 2 * torch.pi * 1000 / 16000)
        >>> pixels = spectrogram_pixels(tone)
        >>> pixels.shape, float(pixels.max())
        (torch.Size([64, 63]), 1.0)
    """
    level = log_mel(waveform, sample_rate=sample_rate)  # (F, M)
    loudest, quietest = level.max(), level.min()
    bottom = torch.maximum(loudest - _DYNAMIC_RANGE, quietest)
    span = (loudest - bottom).clamp_min(1e-6)
    return ((level - bottom) / span).clamp(0, 1).T.flip(0)  # (M, F)


def draw_spectrogram(path: Path) -> bytes:
    """Draw the spectrogram of an audio file.

    Args:
        path: Path of the file, of which the first 30 s are drawn.

    Returns:
        A PNG file: time to the right, mel bands upwards from 50 Hz to 8 kHz.

    Raises:
        AudioFileError: The file cannot be read.
        ImportError: matplotlib, soundfile or torchaudio is missing.
    """
    with open_audio(path.name, path) as recording:
        check_recording(recording, samples=False)
        waveform = read_segment(recording, SAMPLE_RATE, 0, int(LONGEST * SAMPLE_RATE))  # (T,)
    pixels = spectrogram_pixels(waveform).repeat_interleave(_PIXELS_PER_BAND, dim=0)  # (2 M, F)
    content = io.BytesIO()
    import_optional("matplotlib.image").imsave(
        content, pixels.numpy(), cmap="magma", vmin=0, vmax=1, format="png"
    )
    return content.getvalue()
