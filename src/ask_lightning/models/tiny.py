"""A small retrieval model that trains on a CPU. Axes: `B` batch, `T` samples, `F` frames, `d` width."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.lr_scheduler import LambdaLR

from ask_lightning.data.audio.features import SILENCE, log_mel_transform
from ask_lightning.interaction import Embeddings
from ask_lightning.models.retriever import (
    Batch,
    InteractionName,
    Retriever,
    at_unit_length,
    batch_waveforms,
)
from ask_lightning.models.spec_augment import SpecAugment
from ask_lightning.models.words import HashedWordEncoder
from ask_lightning.utilities.arguments import (
    check_choice,
    check_count,
    check_fraction,
    check_positive,
    check_range,
)

_WARM_UP = 0.05


class ConvolutionalAudioEncoder(nn.Module):
    """Encodes log-mel spectrograms: strided convolutions, a recurrent network over time, its maximum.

    The recurrent network makes the embedding depend on the order of sounds, as it does for words.

    Args:
        width: d, width of the output.
        num_mels: Number of mel bins.
        channels: Number of channels of each convolution; each halves time and frequency.
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
        self.recurrent = nn.GRU(incoming * bins, time_width, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * time_width, width)

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Encode spectrograms.

        Args:
            spectrogram: `(B, F, num_mels)` as `log_mel` makes it.
            num_frames: `(B,)` integers from 1 to F, length of each row without padding. A row is encoded as
                if it were alone in a batch without padding. None: rows have no padding.

        Returns:
            `(B, width)`, not normalised.
        """
        states, _ = self._states(spectrogram, num_frames)
        projected: Tensor = self.project(states.amax(dim=1))  # (B, width)
        return projected

    def with_frames(
        self, spectrogram: Tensor, num_frames: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode spectrograms, and each of their frames.

        Args:
            spectrogram: `(B, F, num_mels)` as `log_mel` makes it.
            num_frames: `(B,)` integers from 1 to F, length of each row without padding. None: rows have no
                padding.

        Returns:
            Clips `(B, width)` and their frames of 0.256 s `(B, ⌈F / 16⌉, width)`, not normalised, and which
            of them are no padding, `(B, ⌈F / 16⌉)` boolean.
        """
        states, inside = self._states(spectrogram, num_frames)
        frames = self.project(states.masked_fill(~inside.unsqueeze(-1), 0))  # (B, F / 16, width)
        return self.project(states.amax(dim=1)), frames, inside

    def _states(self, spectrogram: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor]:
        """States over time `(B, F / 16, 2 time_width)`, -inf in padding, and which are no padding."""
        # From silence to loud, log power rises from -11.5 by about 15: this brings it to about -1 … 1.
        maps = ((spectrogram - SILENCE / 2) / 6).unsqueeze(1)  # (B, 1, F, num_mels)
        for layer in self.convolutions:
            if isinstance(layer, nn.Conv2d) and num_frames is not None:
                # A convolution sees zeros beyond the end of its input.
                beyond = torch.arange(maps.shape[2], device=maps.device) >= num_frames.unsqueeze(1)  # (B, F)
                maps = maps.masked_fill(beyond[:, None, :, None], 0)
                num_frames = (num_frames + 1) // 2
            maps = layer(maps)  # at last (B, channels, F / 16, num_mels / 16)
        frames = maps.transpose(1, 2).flatten(2)  # (B, F / 16, channels * num_mels / 16)
        if num_frames is None:
            states, _ = self.recurrent(frames)  # (B, F / 16, 2 time_width)
            return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        packed = pack_padded_sequence(frames, num_frames.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, padding_value=-torch.inf
        )  # (B, F / 16, 2 time_width)
        return states, torch.arange(states.shape[1], device=states.device) < num_frames.unsqueeze(1)


class TinyRetriever(Retriever):
    """A small audio–text retrieval model of half a million weights: two encoders and the NT-Xent loss.

    It serves for trying things out: an epoch of 1,500 pairs takes a few seconds on two CPU cores. It trains
    by itself; ASK wraps it as it wraps any other model.

    Batches are those of `ask_lightning.data`: a dict with `"waveform"` `(B, T)` and optionally
    `"num_samples"` `(B,)`, where padding starts, or with precomputed `"log_mel"` `(B, F, num_mels)`, which is
    taken if both are there; with `"caption"`, a list of `B` texts, and `"clip_id"` `(B,)`. It logs
    `train/loss`, and under `val/` and `test/` the retrieval metrics and `mean_recall`, the mean of all
    recalls of both directions.

    Args:
        width: d, width of the embeddings.
        temperature: τ of the loss, above 0.
        learning_rate: Highest learning rate of AdamW, above 0.
        weight_decay: Weight decay of AdamW, at least 0.
        schedule: `"cosine"`: the learning rate rises over the first twentieth of the steps and falls to 0
            until the last. `"constant"`: it stays.
        masked_share: Largest fraction of the time, and of the mel bins, that is silenced in each training
            example (SpecAugment), in [0, 1). 0 silences nothing.
        sample_rate: Sample rate of the waveforms, in Hz.
        num_mels: Number of mel bins.
        interaction: How clips and captions are compared. `"prototypes"`: a `PrototypeAttention` of frames and
            words, in the manner of GPA. `"frames"`: a `FrameWiseInteraction`, in the manner of FLAM. None:
            dot product of the embeddings.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> model = TinyRetriever(width=8)
        >>> model.encode_audio({"waveform": torch.zeros(2, 16000)}).shape
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
        interaction: InteractionName | None = None,
    ) -> None:
        super().__init__(temperature)
        check_positive("learning_rate", learning_rate)
        check_range("weight_decay", weight_decay, 0)
        check_choice("schedule", schedule, ("cosine", "constant"))
        check_fraction("masked_share", masked_share)
        check_count("sample_rate", sample_rate)
        check_count("num_mels", num_mels)
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.sample_rate = sample_rate
        self.num_mels = num_mels
        self.spec_augment: nn.Module = nn.Identity()
        if masked_share:
            self.spec_augment = SpecAugment(masked_share, masked_share, count=1, value=SILENCE)
        self.audio_encoder = ConvolutionalAudioEncoder(width, num_mels)
        self.text_encoder = HashedWordEncoder(width)
        self.compare_by_name(interaction, width)

    def encode_audio(self, batch: Batch) -> Embeddings:
        """Encode the clips of a batch.

        Args:
            batch: A batch with `"log_mel"`, or with `"waveform"` and optionally `"num_samples"`.

        Returns:
            `(B, d)`, L2-normalised; with an interaction of tokens, `TokenEmbeddings` of clips and frames.

        Raises:
            ValueError: The batch has neither, waveforms of another shape, or another number of mel bins.
        """
        spectrogram, num_frames = self._spectrogram(batch)
        encode: Callable[..., Any] = (
            self.audio_encoder.with_frames if self.needs_tokens else self.audio_encoder
        )
        return at_unit_length(encode(self.spec_augment(spectrogram), num_frames))

    def encode_text(self, batch: Batch) -> Embeddings:
        """Encode the captions of a batch.

        Args:
            batch: A batch with `"caption"`.

        Returns:
            `(B, d)`, L2-normalised; with an interaction of tokens, `TokenEmbeddings` of captions and words.
        """
        encode: Callable[..., Any] = self.text_encoder.with_tokens if self.needs_tokens else self.text_encoder
        return at_unit_length(encode(batch["caption"]))

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
        scheduler = LambdaLR(optimizer, lambda step: _warmup_cosine_factor(step, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _spectrogram(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Spectrograms `(B, F, num_mels)` of a batch, and `(B,)` lengths without padding, if known."""
        if "log_mel" in batch:
            spectrogram: Tensor = batch["log_mel"]
            if spectrogram.shape[-1] != self.num_mels:
                raise ValueError(
                    f"The batch has {spectrogram.shape[-1]} mel bins, but the model {self.num_mels}. Give "
                    "the same `num_mels` to the data and to the model."
                )
            return spectrogram, None
        if "waveform" not in batch:
            raise ValueError(f"A batch has to hold 'log_mel' or 'waveform', but got the keys {list(batch)}.")
        waveform, num_samples = batch_waveforms(batch)
        log_mel = log_mel_transform(self.sample_rate, self.num_mels, waveform.device)
        if num_samples is None:
            return log_mel(waveform), None
        return log_mel(waveform), log_mel.num_frames(num_samples.clamp_max(waveform.shape[1]))


def _warmup_cosine_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at a step: a linear warm-up, then half a cosine."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
