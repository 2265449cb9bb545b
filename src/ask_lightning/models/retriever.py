"""What the retrieval models share: the loss, the metrics, Adam. Axes: `B` batch, `T` samples, `d` width."""

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import StepLR

from ask_lightning.functional import nt_xent
from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.models.frontend import LogMel, Resample
from ask_lightning.models.text import TextEncoder

Batch = dict[str, Any]


class Retriever(L.LightningModule, ABC):
    """An audio–text retrieval model: a subclass says how clips and captions become embeddings.

    It trains with the symmetric NT-Xent loss. Logged are `train/loss`, and under `val/` and `test/` the
    retrieval metrics and `mean_recall`, the mean of all recalls of both directions.

    Args:
        temperature: τ of the loss, above 0.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> class Lookup(Retriever):
        ...     def forward_audio(self, batch):
        ...         return torch.eye(4)[batch["clip_id"]]
        ...     forward_text = forward_audio
        >>> Lookup(temperature=0.1).loss(torch.eye(4), torch.eye(4)) < 1e-3
        tensor(True)
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"Argument `temperature` has to be positive, but got {temperature}.")
        self.temperature = temperature
        self.val_metrics = AudioTextRetrieval()
        self.test_metrics = AudioTextRetrieval()

    @abstractmethod
    def forward_audio(self, batch: Batch) -> Tensor:
        """Encode the clips of a batch.

        Args:
            batch: See the class.

        Returns:
            `(B, d)`, L2-normalised.
        """

    @abstractmethod
    def forward_text(self, batch: Batch) -> Tensor:
        """Encode the captions of a batch.

        Args:
            batch: With `"caption"`.

        Returns:
            `(B, d)`, L2-normalised.
        """

    def loss(self, audio: Tensor, text: Tensor) -> Tensor:
        """The symmetric NT-Xent loss, in float32 whatever autocast is active.

        Args:
            audio: `(B, d)`.
            text: `(B, d)`, row i belongs to row i of `audio`.

        Returns:
            0-d.
        """
        with torch.autocast(audio.device.type, enabled=False):
            similarity = text.float() @ audio.float().T  # (B, B)
            return (nt_xent(similarity, self.temperature) + nt_xent(similarity.T, self.temperature)) / 2

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The symmetric NT-Xent loss of a batch.

        Args:
            batch: See the class.
            batch_idx: Not used.

        Returns:
            0-d.
        """
        audio, text = self.forward_audio(batch), self.forward_text(batch)
        loss = self.loss(audio, text)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(audio))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch into the metrics of the epoch."""
        self.val_metrics.update(self.forward_audio(batch), self.forward_text(batch), batch["clip_id"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a batch into the metrics of the epoch."""
        self.test_metrics.update(self.forward_audio(batch), self.forward_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics(self.test_metrics, "test")

    def _log_metrics(self, metrics: AudioTextRetrieval, stage: str) -> None:
        scores = metrics.compute()
        metrics.reset()
        recalls = torch.stack([score for name, score in scores.items() if "recall_at" in name])
        scores["mean_recall"] = recalls.mean()
        # The metric has gathered the rows of all processes, so that every process logs the same numbers.
        self.log_dict({f"{stage}/{name}": score for name, score in scores.items()}, sync_dist=True)


class FineTunedRetriever(Retriever):
    """A retrieval model of published encoders, which hear waveforms and are fine-tuned with Adam.

    Args:
        sample_rate: Of the waveforms in the batches, in Hz.
        model_rate: What the audio encoder was trained with, in Hz. Waveforms of another rate are resampled
            on the device where they are.
        temperature: τ of the loss, above 0.
        learning_rate: Of Adam at the start, above 0.
        decay_epochs: The learning rate is multiplied by `decay_factor` each time so many epochs have passed.
        decay_factor: In (0, 1]. 1: it stays.

    Raises:
        ValueError: An argument is outside its range.
    """

    def __init__(
        self,
        sample_rate: int,
        model_rate: int,
        *,
        temperature: float,
        learning_rate: float,
        decay_epochs: int,
        decay_factor: float,
    ) -> None:
        super().__init__(temperature)
        if not learning_rate > 0:
            raise ValueError(f"Argument `learning_rate` has to be positive, but got {learning_rate}.")
        if decay_epochs < 1:
            raise ValueError(f"Argument `decay_epochs` has to be at least 1, but got {decay_epochs}.")
        if not 0 < decay_factor <= 1:
            raise ValueError(f"Argument `decay_factor` has to be in (0, 1], but got {decay_factor}.")
        self.learning_rate = learning_rate
        self.decay_epochs = decay_epochs
        self.decay_factor = decay_factor
        self.resample = Resample(sample_rate, model_rate)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, and a learning rate that falls in steps of whole epochs."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
        scheduler = StepLR(optimizer, step_size=self.decay_epochs, gamma=self.decay_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def heard(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The waveforms of a batch at the rate of the audio encoder.

        Args:
            batch: With `"waveform"` `(B, T)` and perhaps `"num_samples"` `(B,)`.

        Returns:
            `(B, T')` float32, and `(B,)` numbers of samples that are no padding, or None.

        Raises:
            ValueError: The batch has no waveforms of this shape.
        """
        waveform = batch.get("waveform")
        if waveform is None:
            raise ValueError(f"A batch has to hold 'waveform', but got the keys {list(batch)}.")
        if waveform.ndim != 2:
            raise ValueError(
                f"The waveforms of a batch have to be of shape (B, T), but got {tuple(waveform.shape)}."
            )
        resampled: tuple[Tensor, Tensor | None] = self.resample(waveform, batch.get("num_samples"))
        return resampled

    def build_without_files(self, **arguments: Any) -> None:
        """Change what a checkpoint says of how the model was built; loggers have noted what was passed.

        The weights of a checkpoint are its own: to load it takes neither the published files nor a network.

        Args:
            **arguments: To be in the checkpoint in place of those that were passed.
        """
        self.hparams.update(arguments)


class ProjectedRetriever(FineTunedRetriever):
    """A model of two published encoders, each with a head of two layers that projects to one width.

    A subclass sets `log_mel`, `audio_encoder` and `text_encoder`, then adds the heads. For arguments see
    `FineTunedRetriever`.
    """

    log_mel: LogMel
    audio_encoder: nn.Module
    text_encoder: TextEncoder

    def add_heads(self, audio_width: int, text_width: int, head_width: int, width: int) -> None:
        """Make the two heads.

        Args:
            audio_width: Of the features of the audio encoder.
            text_width: Of those of the text encoder.
            head_width: Between the two layers of each head.
            width: d, of the embeddings.
        """
        self.audio_head = projection(audio_width, head_width, width)
        self.text_head = projection(text_width, head_width, width)

    def forward_audio(self, batch: Batch) -> Tensor:
        """Encode the clips of a batch.

        Args:
            batch: With `"waveform"`, and perhaps `"num_samples"`: what comes after is not heard.

        Returns:
            `(B, d)`, L2-normalised.

        Raises:
            ValueError: The batch has no waveforms.
        """
        waveform, num_samples = self.heard(batch)
        num_frames = None if num_samples is None else self.log_mel.num_frames(num_samples)
        features = self.audio_encoder(self.log_mel(waveform), num_frames)  # (B, audio_width)
        return normalize(self.audio_head(features).float(), dim=-1)

    def forward_text(self, batch: Batch) -> Tensor:
        """Encode the captions of a batch.

        Args:
            batch: With `"caption"`.

        Returns:
            `(B, d)`, L2-normalised.
        """
        return normalize(self.text_head(self.text_encoder(batch["caption"])).float(), dim=-1)


def projection(incoming: int, hidden: int, width: int) -> nn.Sequential:
    """A head of two layers.

    Args:
        incoming: Width of the encoder.
        hidden: Width between the layers.
        width: Of the output.

    Examples:
        >>> projection(6, 8, 4)(torch.zeros(2, 6)).shape
        torch.Size([2, 4])
    """
    return nn.Sequential(nn.Linear(incoming, hidden), nn.ReLU(), nn.Linear(hidden, width))
