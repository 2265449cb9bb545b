"""Waveforms to log-mel spectrograms, on torchaudio. Axes: `B` batch, `T` samples, `F` frames, `M` mels."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ask_lightning.utilities.optional_imports import import_optional

_SMALLEST_POWER = 1e-10


class _Constants(nn.Module):
    """Windows and filters: they follow the module's device, stay float32 and are in no checkpoint."""

    def keep(self, transform: Any) -> Any:
        """Take in a transform of torchaudio."""
        for module in transform.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)
        return transform

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # `precision="bf16-true"` would round the filters, and torch has no Fourier transform in bfloat16.
        def follow(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        moved: nn.Module = super()._apply(follow, recurse)  # type: ignore[no-untyped-call]
        return moved


class Resample(_Constants):
    """Waveforms at another sample rate.

    Args:
        from_rate: Of what comes in, in Hz.
        to_rate: Of what goes out, in Hz. Equal rates pass through.

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
        if from_rate < 1:
            raise ValueError(f"Argument `sample_rate` has to be at least 1 Hz, but got {from_rate}.")
        if to_rate < 1:
            raise ValueError(f"Argument `to_rate` has to be at least 1 Hz, but got {to_rate}.")
        self.from_rate = from_rate
        self.to_rate = to_rate
        self.transform: Any = nn.Identity()
        if from_rate != to_rate:
            transforms = import_optional("torchaudio.transforms")
            self.transform = self.keep(transforms.Resample(from_rate, to_rate))

    def forward(self, waveform: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Resample a batch, in float32 whatever autocast is active.

        Args:
            waveform: `(B, T)`.
            num_samples: `(B,)` integers, how many samples of each row are no padding. None: all.

        Returns:
            `(B, T')`, and the numbers of samples at the new rate, or None.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            resampled: Tensor = self.transform(waveform.float())  # (B, T')
        if num_samples is not None and self.from_rate != self.to_rate:
            num_samples = -(-num_samples * self.to_rate // self.from_rate)
        return resampled, num_samples


class LogMel(_Constants):
    """Log-mel spectrograms in decibels, with the settings of published audio encoders.

    Args:
        sample_rate: In Hz.
        window: Length of the Hann window and of the Fourier transform, in samples.
        hop: Distance of neighbouring frames, in samples.
        lowest: Lower end of the lowest mel band, in Hz.
        highest: Upper end of the highest mel band, in Hz.
        num_mels: M.
        scale: `"slaney"`: the filters of librosa, of equal area. `"htk"`: those of torchaudio, of equal
            height.
        dynamic_range: What is so many decibels below the loudest place of its clip is raised to there.
            None: nothing is, down to -100 dB.
        min_frames: Shorter clips are filled up with silence to so many frames.

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
        highest: float,
        num_mels: int = 64,
        scale: Literal["slaney", "htk"],
        dynamic_range: float | None = None,
        min_frames: int = 1,
    ) -> None:
        super().__init__()
        self.hop = hop
        self.dynamic_range = dynamic_range
        # The ends are reflected, which takes half a window of samples.
        self.min_samples = max(window // 2 + 1, (min_frames - 1) * hop)
        self.transform = self.keep(
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
        """Compute spectrograms, in float32 whatever autocast is active.

        Args:
            waveform: `(B, T)`.

        Returns:
            `(B, F, M)` decibels, `F = num_frames(T)`. A clip does not depend on the others.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            filled = pad(waveform.float(), (0, max(0, self.min_samples - waveform.shape[-1])))  # (B, T')
            power: Tensor = self.transform(filled)  # (B, M, F)
            decibels = 10 * power.clamp_min(_SMALLEST_POWER).log10()
            if self.dynamic_range is not None:
                loudest = decibels.amax(dim=(-2, -1), keepdim=True)  # (B, 1, 1)
                decibels = torch.maximum(decibels, loudest - self.dynamic_range)
        return decibels.transpose(-2, -1)  # (B, F, M)

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """How many frames are made of so many samples.

        Args:
            num_samples: `(B,)` integers.

        Returns:
            `(B,)` integers.

        Examples:
            >>> log_mel = LogMel(16000, window=512, hop=160, lowest=0, highest=8000, scale="htk")
            >>> log_mel.num_frames(torch.tensor([16000, 0]))
            tensor([101,   2])
        """
        return num_samples.clamp_min(self.min_samples) // self.hop + 1


class SpecAugment(nn.Module):
    """Stretches of time and bands of frequencies are set to 0 while training, for each example others.

    Reference: Park et al., "SpecAugment", Interspeech 2019 (arXiv 1904.08779), with the sizes of PANNs.

    Args:
        time_width: Largest length of a stretch of time, in frames; never more than half of the clip.
        band_width: Largest width of a band, in mel bins; never more than half of them.
        count: How many stretches, and how many bands.

    Raises:
        ValueError: An argument is negative.

    Examples:
        >>> augment = SpecAugment()
        >>> augment(torch.ones(4, 1000, 64)).mean() < 1
        tensor(True)
        >>> augment.eval()(torch.ones(4, 1000, 64)).mean()
        tensor(1.)
    """

    def __init__(self, time_width: int = 64, band_width: int = 8, count: int = 2) -> None:
        super().__init__()
        for name, value in (("time_width", time_width), ("band_width", band_width), ("count", count)):
            if value < 0:
                raise ValueError(f"Argument `{name}` has to be at least 0, but got {value}.")
        self.time_width = time_width
        self.band_width = band_width
        self.count = count

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Mask spectrograms in training mode, pass them through in evaluation mode.

        Args:
            spectrogram: `(B, F, M)`, best with a mean of 0.

        Returns:
            `(B, F, M)`; places and widths are drawn from torch's global generator.
        """
        if not self.training:
            return spectrogram
        _, num_frames, num_mels = spectrogram.shape
        time = self._covered(spectrogram, num_frames, self.time_width).unsqueeze(2)  # (B, F, 1)
        bands = self._covered(spectrogram, num_mels, self.band_width).unsqueeze(1)  # (B, 1, M)
        return spectrogram.masked_fill(time | bands, 0.0)

    def _covered(self, like: Tensor, length: int, largest: int) -> Tensor:
        """`(B, length)` boolean, true in `count` stretches of each row."""
        shape = (len(like), self.count, 1)
        size, place = torch.rand(2, *shape, device=like.device)  # (B, count, 1) each
        size = (size * (min(largest, length // 2) + 1)).floor()
        start = (place * (length - size + 1)).floor()
        positions = torch.arange(length, device=like.device)
        inside: Tensor = (positions >= start) & (positions < start + size)  # (B, count, length)
        return inside.any(dim=1)


def frames_of_seconds(seconds: float, sample_rate: int, hop: int) -> int:
    """How many frames a clip of so many seconds has.

    Args:
        seconds: Length of the clip.
        sample_rate: In Hz.
        hop: Distance of neighbouring frames, in samples.

    Examples:
        >>> frames_of_seconds(10, 32000, 320)
        1001
    """
    return math.floor(seconds * sample_rate) // hop + 1
