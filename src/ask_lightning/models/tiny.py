"""A small retrieval model that trains on a CPU. Axes: `B` batch, `T` samples, `F` frames, `d` width."""

import math
from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import LambdaLR

from ask_lightning.data.audio.features import SILENCE, log_mel
from ask_lightning.models.retriever import Batch, Retriever
from ask_lightning.models.words import HashedWordEncoder

_WARM_UP = 0.05


class ConvolutionalAudioEncoder(nn.Module):
    """Log-mel spectrogram to one vector: strided convolutions, a recurrent network over time, its maximum.

    The recurrent network makes the order of sounds count, as it does for words.

    Args:
        width: d, of the output.
        num_mels: Number of mel bins.
        channels: Of each of the convolutions, which halve time and frequency.
        time_width: Width of each direction of the recurrent network.

    Examples:
        >>> encoder = ConvolutionalAudioEncoder(width=8)
        >>> encoder(torch.zeros(2, 100, 64)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        width: int,
        num_mels: int = 64,
        channels: tuple[int, ...] = (8, 16, 32, 48),
        time_width: int = 64,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        incoming, bins = 1, num_mels
        for outgoing in channels:
            stages += [
                nn.Conv2d(incoming, outgoing, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outgoing),
                nn.ReLU(),
            ]
            incoming, bins = outgoing, (bins + 1) // 2
        self.convolutions = nn.Sequential(*stages)
        self.order = nn.GRU(incoming * bins, time_width, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * time_width, width)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Encode spectrograms.

        Args:
            spectrogram: `(B, F, num_mels)` as `log_mel` makes it.

        Returns:
            `(B, width)`, not normalised.
        """
        # From silence to loud, log power rises from -11.5 by about 15: this brings it to about -1 … 1.
        scaled = (spectrogram - SILENCE / 2) / 6
        maps = self.convolutions(scaled.unsqueeze(1))  # (B, channels, F / 16, num_mels / 16)
        frames = maps.transpose(1, 2).flatten(2)  # (B, F / 16, channels * num_mels / 16)
        states, _ = self.order(frames)  # (B, F / 16, 2 time_width)
        projected: Tensor = self.project(states.amax(dim=1))  # (B, width)
        return projected


class TinyRetriever(Retriever):
    """An audio–text retrieval model of half a million weights: two encoders and the NT-Xent loss.

    A model to try things on: an epoch of 1,500 pairs takes a few seconds on two CPU cores. It trains by
    itself; ASK wraps it as it wraps any other model.

    Batches are those of `ask_lightning.data`: a dict with `"log_mel"` `(B, F, num_mels)` or `"waveform"`
    `(B, T)`, `"caption"`, a list of `B` texts, and `"clip_id"` `(B,)`. Logged are `train/loss`, and under
    `val/` and `test/` the retrieval metrics and `mean_recall`, the mean of all recalls of both directions.

    Args:
        width: d, of the embeddings.
        temperature: τ of the loss, above 0.
        learning_rate: Of AdamW, at its highest.
        weight_decay: Of AdamW, at least 0.
        schedule: `"cosine"`: the learning rate rises over the first twentieth of the steps and falls to 0
            until the last. `"constant"`: it stays.
        masked_share: Largest share of the time, and of the mel bins, that is silenced in each training
            example (SpecAugment), in [0, 1). 0 silences nothing.
        sample_rate: Of waveforms, in Hz.
        num_mels: Number of mel bins.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> model = TinyRetriever(width=8)
        >>> model.encode_audio({"log_mel": torch.zeros(2, 100, 64)}).shape
        torch.Size([2, 8])
        >>> model.encode_text({"caption": ["rain, then wind", "a dog barking"]}).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        width: int = 128,
        *,
        temperature: float = 0.07,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-2,
        schedule: Literal["cosine", "constant"] = "cosine",
        masked_share: float = 0.0,
        sample_rate: int = 16000,
        num_mels: int = 64,
    ) -> None:
        super().__init__(temperature)
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"Argument `schedule` has to be 'cosine' or 'constant', but got {schedule!r}.")
        if not 0 <= masked_share < 1:
            raise ValueError(f"Argument `masked_share` has to be in [0, 1), but got {masked_share}.")
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.masked_share = masked_share
        self.sample_rate = sample_rate
        self.num_mels = num_mels
        self.audio_encoder = ConvolutionalAudioEncoder(width, num_mels)
        self.text_encoder = HashedWordEncoder(width)

    def encode_audio(self, batch: Batch) -> Tensor:
        """Encode the clips of a batch.

        Args:
            batch: With `"log_mel"` or `"waveform"`.

        Returns:
            `(B, d)`, L2-normalised.

        Raises:
            ValueError: The batch has neither, or another number of mel bins.
        """
        spectrogram = self._spectrogram(batch)
        if self.training and self.masked_share:
            spectrogram = mask_spectrogram(spectrogram, self.masked_share)
        return normalize(self.audio_encoder(spectrogram), dim=-1)

    def encode_text(self, batch: Batch) -> Tensor:
        """Encode the captions of a batch.

        Args:
            batch: With `"caption"`.

        Returns:
            `(B, d)`, L2-normalised.
        """
        return normalize(self.text_encoder(batch["caption"]), dim=-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the chosen schedule.

        Raises:
            ValueError: The schedule needs to know the number of steps, and training has no end.
        """
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                "The cosine schedule needs to know when training ends. Set `max_epochs` or `max_steps` of "
                'the Trainer, or `schedule="constant"`.'
            )
        scheduler = LambdaLR(optimizer, lambda step: _warm_cosine(step, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _spectrogram(self, batch: Batch) -> Tensor:
        if "log_mel" not in batch and "waveform" not in batch:
            raise ValueError(f"A batch has to hold 'log_mel' or 'waveform', but got the keys {list(batch)}.")
        if "log_mel" not in batch:
            return log_mel(batch["waveform"], sample_rate=self.sample_rate, num_mels=self.num_mels)
        spectrogram: Tensor = batch["log_mel"]
        if spectrogram.shape[-1] != self.num_mels:
            raise ValueError(
                f"The batch has {spectrogram.shape[-1]} mel bins, but the model {self.num_mels}. Give the "
                "same `num_mels` to the data and to the model."
            )
        return spectrogram


def mask_spectrogram(spectrogram: Tensor, largest_share: float) -> Tensor:
    """Silence one stretch of time and one band of frequencies of each example, as SpecAugment does.

    Reference: Park et al., "SpecAugment", Interspeech 2019 (arXiv 1904.08779).

    Args:
        spectrogram: `(B, F, M)` log power.
        largest_share: Up to which share of the frames, and of the bins, in [0, 1).

    Returns:
        `(B, F, M)`; places and widths are drawn from torch's global generator.

    Examples:
        >>> masked = mask_spectrogram(torch.zeros(2, 100, 64), largest_share=0.5)
        >>> masked.shape, (masked == 0).float().mean() > 0.2
        (torch.Size([2, 100, 64]), tensor(True))
    """
    _, num_frames, num_bins = spectrogram.shape
    time = _stretches(spectrogram, num_frames, largest_share).unsqueeze(2)  # (B, F, 1)
    band = _stretches(spectrogram, num_bins, largest_share).unsqueeze(1)  # (B, 1, M)
    return spectrogram.masked_fill(time | band, SILENCE)


def _stretches(like: Tensor, length: int, largest_share: float) -> Tensor:
    """`(B, length)` boolean, true in one stretch of each row."""
    sizes, places = torch.rand(2, len(like), 1, device=like.device)  # (B, 1) each
    size = sizes * largest_share * length
    start = places * (length - size)
    positions = torch.arange(length, device=like.device)
    inside: Tensor = (positions >= start) & (positions < start + size)
    return inside


def _warm_cosine(step: int, steps: int) -> float:
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
