"""Resampling and log-mel spectrograms, on torchaudio. Axes: `B` batch, `T` samples, `F` frames, `M` mels."""

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.optional_imports import import_optional

_WINDOW_SECONDS = 0.032
_HOP_SECONDS = 0.016
_LOWEST_HERTZ = 50.0
_SMALLEST_POWER = 1e-5

SILENCE = math.log(_SMALLEST_POWER)
"""The value of every bin of the spectrograms of `log_mel` where nothing sounds."""


class _FixedTransform(nn.Module):
    """A module around a transform of torchaudio that has nothing to learn.

    Windows and filters follow the module's device, stay float32 and are in no checkpoint.
    """

    def _exclude_from_checkpoints(self, transform: Any) -> Any:
        """Make the buffers of a transform non-persistent, and return it."""
        for module in transform.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)
        return transform

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # `precision="bf16-true"` would round the filters, and torch has no Fourier transform in bfloat16.
        def move_only(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        moved: nn.Module = super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        return moved


class Resample(_FixedTransform):
    """Resamples batches of waveforms.

    Args:
        from_rate: Sample rate of the input, in Hz.
        to_rate: Sample rate of the output, in Hz. If both are equal, waveforms pass through.

    Raises:
        ValueError: A rate is not positive.
        ImportError: torchaudio is missing or does not load.

    Examples:
        >>> waveform, num_samples = Resample(16000, 32000)(torch.zeros(2, 800), torch.tensor([800, 400]))
        >>> waveform.shape, num_samples
        (torch.Size([2, 1600]), tensor([1600,  800]))
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        super().__init__()
        check_count("from_rate", from_rate)
        check_count("to_rate", to_rate)
        self.from_rate = from_rate
        self.to_rate = to_rate
        self.transform: Any = nn.Identity()
        if from_rate != to_rate:
            transforms = import_optional("torchaudio.transforms")
            self.transform = self._exclude_from_checkpoints(transforms.Resample(from_rate, to_rate))

    def forward(self, waveform: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Resample a batch, in float32 even under autocast.

        Args:
            waveform: `(B, T)`.
            num_samples: `(B,)` integers, length of each row without padding. None: rows have no padding.

        Returns:
            `(B, T')` waveforms, and the lengths at the new rate, or None.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            resampled: Tensor = self.transform(waveform.float())  # (B, T')
        if num_samples is not None and self.from_rate != self.to_rate:
            num_samples = -(-num_samples * self.to_rate // self.from_rate)
        return resampled, num_samples


class LogMel(_FixedTransform):
    """Log-mel spectrograms, with the settings of published audio encoders or others.

    Args:
        sample_rate: Sample rate of the waveforms, in Hz.
        window: Length of the Hann window and of the Fourier transform, in samples.
        hop: Distance between neighbouring frames, in samples.
        lowest: Lower end of the lowest mel band, in Hz.
        highest: Upper end of the highest mel band, in Hz. None: half the sample rate.
        num_mels: M, number of mel bands.
        scale: `"slaney"`: the filters of librosa, which have equal area. `"htk"`: the filters of torchaudio,
            which have equal height.
        unit: `"decibel"`: 10 log10 of the power. `"natural"`: natural logarithm of the power.
        smallest_power: Smaller powers count as this one.
        dynamic_range: In each clip, values that lie further than this below the loudest one are raised to
            that level. None: only `smallest_power` bounds them.
        min_frames: Shorter clips are padded with silence to this number of frames.

    Raises:
        ImportError: torchaudio is missing or does not load.

    Examples:
        >>> log_mel = LogMel(32000, window=1024, hop=320, lowest=50, highest=14000, scale="slaney")
        >>> log_mel(torch.zeros(2, 32000)).shape
        torch.Size([2, 101, 64])
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        window: int,
        hop: int,
        lowest: float,
        highest: float | None = None,
        num_mels: int = 64,
        scale: Literal["slaney", "htk"],
        unit: Literal["decibel", "natural"] = "decibel",
        smallest_power: float = 1e-10,
        dynamic_range: float | None = None,
        min_frames: int = 1,
    ) -> None:
        super().__init__()
        self.hop = hop
        self.unit = unit
        self.smallest_power = smallest_power
        self.dynamic_range = dynamic_range
        # Both ends are padded by reflection, which takes half a window of samples.
        self.min_samples = max(window // 2 + 1, (min_frames - 1) * hop)
        self.transform = self._exclude_from_checkpoints(
            import_optional("torchaudio.transforms").MelSpectrogram(
                sample_rate=sample_rate,
                n_fft=window,
                hop_length=hop,
                f_min=lowest,
                f_max=highest,
                n_mels=num_mels,
                norm="slaney" if scale == "slaney" else None,
                mel_scale=scale,
            )
        )

    def forward(self, waveform: Tensor) -> Tensor:
        """Compute spectrograms, in float32 even under autocast.

        Args:
            waveform: `(..., T)` mono audio.

        Returns:
            `(..., F, M)` with `F = num_frames(T)`. A clip does not depend on the others of its batch, except
            by padding: what follows a clip's last sample is heard in its last half window, where a clip alone
            is reflected.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            padded = pad(waveform.float(), (0, max(0, self.min_samples - waveform.shape[-1])))  # (..., T')
            power: Tensor = self.transform(padded).clamp_min(self.smallest_power)  # (..., M, F)
            level = 10 * power.log10() if self.unit == "decibel" else power.log()
            if self.dynamic_range is not None:
                loudest = level.amax(dim=(-2, -1), keepdim=True)  # (..., 1, 1)
                level = torch.maximum(level, loudest - self.dynamic_range)
        return level.transpose(-2, -1)  # (..., F, M)

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Number of frames of clips of given lengths.

        Args:
            num_samples: `(B,)` integers, lengths of the clips.

        Returns:
            `(B,)` integers.

        Examples:
            >>> log_mel = LogMel(16000, window=512, hop=160, lowest=0, highest=8000, scale="htk")
            >>> log_mel.num_frames(torch.tensor([16000, 0]))
            tensor([101,   2])
        """
        return num_samples.clamp_min(self.min_samples) // self.hop + 1


def log_mel(waveform: Tensor, *, sample_rate: int = 16000, num_mels: int = 64) -> Tensor:
    """Log-mel spectrogram with windows of 32 ms every 16 ms, in float32 even under autocast.

    Args:
        waveform: `(..., T)` mono audio.
        sample_rate: Sample rate of the waveform, in Hz.
        num_mels: Number of mel bands between 50 Hz and half the sample rate.

    Returns:
        `(..., F, num_mels)` natural logarithm of the power, at least `SILENCE`, with `F = num_frames(T)`.

    Raises:
        ImportError: torchaudio is missing or does not load.

    Examples:
        >>> log_mel(torch.zeros(2, 16000)).shape
        torch.Size([2, 63, 64])
    """
    spectrogram: Tensor = log_mel_transform(sample_rate, num_mels, waveform.device)(waveform)
    return spectrogram


def num_frames(num_samples: int, sample_rate: int = 16000) -> int:
    """Number of frames that `log_mel` makes of a clip.

    Args:
        num_samples: Length of the waveform.
        sample_rate: Sample rate of the waveform, in Hz.

    Examples:
        >>> num_frames(16000)
        63
    """
    shortest = _num_samples(_WINDOW_SECONDS, sample_rate) // 2 + 1
    return max(num_samples, shortest) // _num_samples(_HOP_SECONDS, sample_rate) + 1


@lru_cache(maxsize=8)
def log_mel_transform(sample_rate: int, num_mels: int, device: torch.device) -> LogMel:
    """The transform of `log_mel`; it is made once for all callers.

    Args:
        sample_rate: Sample rate of the waveforms, in Hz.
        num_mels: Number of mel bands.
        device: Device of the waveforms.

    Raises:
        ImportError: torchaudio is missing or does not load.
    """
    transform = LogMel(
        sample_rate,
        window=_num_samples(_WINDOW_SECONDS, sample_rate),
        hop=_num_samples(_HOP_SECONDS, sample_rate),
        lowest=_LOWEST_HERTZ,
        num_mels=num_mels,
        scale="htk",
        unit="natural",
        smallest_power=_SMALLEST_POWER,
    )
    return transform.to(device)


def _num_samples(seconds: float, sample_rate: int) -> int:
    return round(seconds * sample_rate)
