"""SpecAugment. Axes: `B` batch, `F` frames, `M` mel bins."""

import torch
from torch import Tensor, nn

from ask_lightning.utilities.arguments import check_count, check_fraction


class SpecAugment(nn.Module):
    """Masks random stretches of time and bands of frequencies of each training example.

    Both ranges exclude their upper end, as in the paper and in the code of PANNs: a stretch of a clip of L
    frames has a length from {0, …, `time_width` - 1} and starts at one of {0, …, L - length - 1}, so that the
    last frame is never masked.

    Reference: Park et al., "SpecAugment", Interspeech 2019 (arXiv 1904.08779), section 2. The default sizes
    are those of PANNs.

    Args:
        time_width: Length that a stretch stays below: a number of frames, which is cut to half of a shorter
            clip, or a fraction of the clip, in [0, 1).
        band_width: Width that a band stays below: a number of mel bins, which is cut to half of them, or a
            fraction of them, in [0, 1).
        count: Number of stretches, and number of bands.
        value: Value that masked places get.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> augment = SpecAugment()
        >>> augment(torch.ones(4, 1000, 64)).mean() < 1
        tensor(True)
        >>> augment.eval()(torch.ones(4, 1000, 64)).mean()
        tensor(1.)
    """

    def __init__(
        self, time_width: float = 64, band_width: float = 8, count: int = 2, *, value: float = 0.0
    ) -> None:
        super().__init__()
        for name, width in (("time_width", time_width), ("band_width", band_width)):
            if isinstance(width, float):
                check_fraction(name, width)
            else:
                check_count(name, width, 0)
        check_count("count", count, 0)
        self.time_width = time_width
        self.band_width = band_width
        self.count = count
        self.value = value

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Mask spectrograms in training mode; pass them through in evaluation mode.

        Args:
            spectrogram: `(B, F, M)`.

        Returns:
            `(B, F, M)`; places and widths are drawn from torch's global generator.
        """
        if not self.training:
            return spectrogram
        _, num_frames, num_mels = spectrogram.shape
        time = self._random_mask(spectrogram, num_frames, self.time_width).unsqueeze(2)  # (B, F, 1)
        bands = self._random_mask(spectrogram, num_mels, self.band_width).unsqueeze(1)  # (B, 1, M)
        return spectrogram.masked_fill(time | bands, self.value)

    def _random_mask(self, spectrogram: Tensor, length: int, width: float) -> Tensor:
        """`(B, length)` boolean, true in `count` stretches of each row."""
        limit = int(width * length) if isinstance(width, float) else min(width, length // 2)
        shape = (len(spectrogram), self.count, 1)
        size, place = torch.rand(2, *shape, device=spectrogram.device)  # (B, count, 1) each
        size = (size * limit).floor()
        start = (place * (length - size)).floor()
        positions = torch.arange(length, device=spectrogram.device)
        inside: Tensor = (positions >= start) & (positions < start + size)  # (B, count, length)
        return inside.any(dim=1)
