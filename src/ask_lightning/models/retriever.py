"""Base classes of the retrieval models: loss, metrics, Adam. Axes: `B` batch, `T` samples, `d` width."""

from abc import ABC, abstractmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import StepLR
from typing_extensions import Self

from ask_lightning.data.audio.features import LogMel, Resample
from ask_lightning.functional import nt_xent
from ask_lightning.interaction import (
    Embeddings,
    FrameWiseInteraction,
    Interaction,
    PrototypeAttention,
    TokenEmbeddings,
    pooled,
)
from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.metrics.table import CALIBRATED, DIRECTIONS, mean_recall
from ask_lightning.models.exported import from_pretrained, save_pretrained
from ask_lightning.models.hub import upload_folder
from ask_lightning.models.text import TextEncoder
from ask_lightning.utilities.arguments import check_choice, check_count, check_positive, check_range

Batch = dict[str, Any]

Padding = Literal["masked", "heard"]
"""`"masked"`: a clip is encoded as if it were alone. `"heard"`: its padding is encoded like sound."""

InteractionName = Literal["prototypes", "frames"]
"""`"prototypes"`: `PrototypeAttention`. `"frames"`: `FrameWiseInteraction`."""


class Retriever(L.LightningModule, ABC):
    """Base class of audio–text retrieval models; a subclass encodes clips and captions.

    It trains with the symmetric NT-Xent loss, to which an embedding regulariser may be added. It logs
    `train/loss`, a learned τ as `train/temperature`, and under `val/` and `test/` the retrieval metrics and
    `mean_recall`, the mean of all recalls of both directions, with `t2a/mean_recall` and `a2t/mean_recall`,
    those of one direction. With `SearchCalibration` among the trainer's callbacks it logs those of calibrated
    search under `test/calibrated/`. Where batches have `"caption_id"`, as those of the datasets here, the
    rows that a sampler repeats to give several processes equally many count once in all of these metrics.

    `ASKModule` replaces the whole loss; `ASKModule(model, criterion="loss")` keeps the regulariser, and the
    command line passes that where there is one.

    Args:
        temperature: τ of the loss, above 0.
        learn_temperature: Whether τ is a parameter that is trained, from this value on.
        embedding_regularizer: Weight of `embedding_spread` of both sides in the training loss, at least 0.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> class Lookup(Retriever):
        ...     def encode_audio(self, batch):
        ...         return torch.eye(4)[batch["clip_id"]]
        ...     encode_text = encode_audio
        >>> Lookup(temperature=0.1).loss(torch.eye(4), torch.eye(4)) < 1e-3
        tensor(True)
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learn_temperature: bool = False,
        embedding_regularizer: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_range("embedding_regularizer", embedding_regularizer, 0)
        self.temperature: float | nn.Parameter = temperature
        if learn_temperature:
            self.temperature = nn.Parameter(torch.tensor(temperature))
        self.embedding_regularizer = embedding_regularizer
        self.interaction: Interaction | None = None
        self.val_metrics = AudioTextRetrieval()
        self.test_metrics = AudioTextRetrieval()

    transformers_part: ClassVar[str | None] = None
    """Name of the attribute that transformers loads by itself from what `save_pretrained` writes."""

    resamples: ClassVar[bool] = False
    """Whether waveforms of any `sample_rate` are resampled to the rate that the weights were trained with."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **hyperparameters: Any,
    ) -> Self:
        """Load a trained model that `save_pretrained` or `ask-lightning export` wrote.

        `Retriever.from_pretrained` loads a model of any subclass. `load_from_checkpoint` is for the
        checkpoints of a training.

        Args:
            source: Path of a folder, or name of a repository on the Hugging Face hub.
            revision: Branch, tag or commit of the repository.
            token: Access token of a private repository. None or True: that of `hf auth login`.
            **hyperparameters: Arguments of the class that replace those of the folder, such as
                `sample_rate`, the rate of your waveforms.

        Returns:
            The model, on the CPU and in evaluation mode.

        Raises:
            FileNotFoundError: There is no such folder or repository, or it lacks a file.
            ImportError: The class that the folder names cannot be imported, or needs a package that is
                missing.
            ValueError: The folder holds a model of another class, or weights that do not fit.
        """
        model: Self = from_pretrained(source, cls, revision=revision, token=token, **hyperparameters)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into a folder from which `from_pretrained` makes it anew.

        Args:
            folder: Folder to write into; it is created if it does not exist.

        Raises:
            ValueError: The model could not be made anew; see `ask_lightning.models.save_pretrained`.
        """
        save_pretrained(self, folder)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the model to the Hugging Face hub, from which `from_pretrained(repository)` makes it anew.

        `ask-lightning export --push` adds a model card with the results of its tests.

        Args:
            repository: Name of the repository, such as `"me/sounds"`, which is made if it does not exist.
            private: Whether a new repository is private.

        Returns:
            Address of the repository.

        Raises:
            ValueError: The model could not be made anew; see `ask_lightning.models.save_pretrained`.
            OSError: The hub cannot be reached or refuses the model.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_folder(folder, repository, private=private)

    def compare_by(self, interaction: Interaction) -> None:
        """Compare clips and captions by an interaction, in the loss and in the metrics.

        Args:
            interaction: Interaction that becomes part of the model, as `interaction`; the encoders have to
                return what it takes. `ASKModule(model, SomeLoss(interaction="interaction"))` uses it as well.
        """
        self.interaction = interaction
        self.val_metrics = AudioTextRetrieval(interaction=interaction)
        self.test_metrics = AudioTextRetrieval(interaction=interaction)

    def compare_by_name(self, name: InteractionName | None, width: int) -> None:
        """Compare clips and captions by a new interaction of a kind.

        Args:
            name: `"prototypes"`: a `PrototypeAttention`. `"frames"`: a `FrameWiseInteraction`. None: nothing
                changes.
            width: d, width of the embeddings.

        Raises:
            ValueError: There is no such kind.
        """
        check_choice("interaction", name, (None, *get_args(InteractionName)))
        if name is not None:
            kind = PrototypeAttention if name == "prototypes" else FrameWiseInteraction
            self.compare_by(kind(width))

    @property
    def needs_tokens(self) -> bool:
        """Whether the encoders return frames and words, which the interaction compares."""
        return self.interaction is not None and self.interaction.needs_tokens

    @abstractmethod
    def encode_audio(self, batch: Batch) -> Embeddings:
        """Encode the clips of a batch.

        Args:
            batch: A batch that holds audio under the keys that the subclass names.

        Returns:
            `(B, d)`, L2-normalised; `TokenEmbeddings` of unit vectors for an interaction that needs tokens.
        """

    @abstractmethod
    def encode_text(self, batch: Batch) -> Embeddings:
        """Encode the captions of a batch.

        Args:
            batch: A batch with `"caption"`.

        Returns:
            `(B, d)`, L2-normalised; `TokenEmbeddings` of unit vectors for an interaction that needs tokens.
        """

    def loss(self, audio: Embeddings, text: Embeddings) -> Tensor:
        """The symmetric NT-Xent loss, in float32 even under autocast.

        Args:
            audio: `(B, d)` audio embeddings, or `TokenEmbeddings`.
            text: Text embeddings of the same kind; row i belongs to row i of `audio`.

        Returns:
            0-d loss.
        """
        if self.interaction is not None:
            to_audio, to_text, _ = self.interaction(text, audio)
            return (nt_xent(to_audio, self.temperature) + nt_xent(to_text, self.temperature)) / 2
        audio, text = pooled(audio), pooled(text)
        with torch.autocast(audio.device.type, enabled=False):
            similarity = text.float() @ audio.float().T  # (B, B)
            return (nt_xent(similarity, self.temperature) + nt_xent(similarity.T, self.temperature)) / 2

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The symmetric NT-Xent loss of a batch, with the regulariser if there is one.

        Args:
            batch: A batch with audio, `"caption"` and `"clip_id"`.
            batch_idx: Not used.

        Returns:
            0-d loss.
        """
        audio, text = self.encode_audio(batch), self.encode_text(batch)
        loss = self.loss(audio, text)
        if self.embedding_regularizer > 0:
            spread = embedding_spread(pooled(audio)) + embedding_spread(pooled(text))
            loss = loss + self.embedding_regularizer * spread
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(audio))
        if isinstance(self.temperature, nn.Parameter):
            self.log("train/temperature", self.temperature.detach().clone(), batch_size=len(audio))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of the epoch with a batch."""
        self._update(self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the metrics of the epoch with a batch."""
        self._update(self.test_metrics, batch)

    def _update(self, metrics: AudioTextRetrieval, batch: Batch) -> None:
        """Update metrics with a batch, in which a sampler for several processes may repeat rows."""
        audio, text = self.encode_audio(batch), self.encode_text(batch)
        metrics.update(audio, text, batch["clip_id"], batch.get("caption_id"))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics(self.test_metrics, "test")

    def _log_metrics(self, metrics: AudioTextRetrieval, stage: str) -> None:
        """Compute, log and reset the metrics of an epoch."""
        scores = metrics.compute()
        metrics.reset()
        logged: dict[str, Tensor | float] = {f"{stage}/{name}": score for name, score in scores.items()}
        calibrated = any(name.startswith(CALIBRATED) for name in scores)
        for prefix in ("", CALIBRATED) if calibrated else ("",):
            logged[f"{stage}/{prefix}mean_recall"] = mean_recall(scores, prefix)
            for direction in DIRECTIONS:
                logged[f"{stage}/{prefix}{direction}/mean_recall"] = mean_recall(scores, prefix, [direction])
        # The metric has gathered the rows of all processes, so that every process logs the same numbers.
        self.log_dict(logged, sync_dist=True)


class FineTunedRetriever(Retriever):
    """Base class of models of published encoders, which take waveforms and are fine-tuned with Adam.

    Args:
        sample_rate: Sample rate of the waveforms in the batches, in Hz.
        model_rate: Sample rate that the audio encoder was trained with, in Hz. Waveforms of another rate are
            resampled on their device.
        temperature: τ of the loss, above 0.
        learning_rate: Learning rate of Adam at the start, above 0.
        decay_epochs: Number of epochs after each of which the learning rate is multiplied by `decay_factor`.
        decay_factor: Factor of the learning rate, in (0, 1]. With 1 it stays constant.
        freeze_audio: Whether the audio encoder keeps its weights; its head is trained. A frozen encoder stays
            in evaluation mode: no dropout, no SpecAugment, and batch norm with its stored statistics.
        freeze_text: Whether the text encoder keeps its weights; its head is trained.
        **loss_options: Further arguments of `Retriever`.

    Raises:
        ValueError: An argument is outside its range.
    """

    resamples: ClassVar[bool] = True

    def __init__(
        self,
        sample_rate: int,
        model_rate: int,
        *,
        temperature: float,
        learning_rate: float,
        decay_epochs: int,
        decay_factor: float,
        freeze_audio: bool = False,
        freeze_text: bool = False,
        **loss_options: Any,
    ) -> None:
        super().__init__(temperature, **loss_options)
        check_count("sample_rate", sample_rate)
        check_positive("learning_rate", learning_rate)
        check_count("decay_epochs", decay_epochs)
        if not 0 < decay_factor <= 1:
            raise ValueError(f"Argument `decay_factor` has to be in (0, 1], but got {decay_factor}.")
        self.learning_rate = learning_rate
        self.decay_epochs = decay_epochs
        self.decay_factor = decay_factor
        self.freeze_audio = freeze_audio
        self.freeze_text = freeze_text
        self.resample = Resample(sample_rate, model_rate)

    @property
    @abstractmethod
    def encoders(self) -> tuple[nn.Module, nn.Module]:
        """The pretrained audio encoder and text encoder, without their heads."""

    @property
    def frozen_encoders(self) -> list[nn.Module]:
        """The encoders that keep their weights."""
        frozen = zip(self.encoders, (self.freeze_audio, self.freeze_text), strict=True)
        return [encoder for encoder, is_frozen in frozen if is_frozen]

    def freeze_encoders(self) -> None:
        """Freeze what `freeze_audio` and `freeze_text` ask for; subclasses call it when encoders exist."""
        for encoder in self.frozen_encoders:
            encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; frozen encoders stay in evaluation mode.

        Args:
            mode: Whether to train.
        """
        super().train(mode)
        for encoder in self.frozen_encoders:
            encoder.eval()
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, and a learning rate that falls in steps of whole epochs."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=self.learning_rate)
        scheduler = StepLR(optimizer, step_size=self.decay_epochs, gamma=self.decay_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def resampled_waveforms(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The waveforms of a batch at the sample rate of the audio encoder.

        Args:
            batch: A batch with `"waveform"` `(B, T)` and optionally `"num_samples"` `(B,)`.

        Returns:
            `(B, T')` float32 waveforms, and `(B,)` lengths without padding, or None.

        Raises:
            ValueError: The batch has no waveforms of this shape.
        """
        resampled: tuple[Tensor, Tensor | None] = self.resample(*batch_waveforms(batch))
        return resampled

    def replace_hyperparameters(self, **arguments: Any) -> None:
        """Replace arguments in the hyperparameters that checkpoints hold.

        A checkpoint holds all weights, so loading it must not need the published files or a network. Loggers
        have recorded the original arguments before.

        Args:
            **arguments: Values by argument name.
        """
        self.hparams.update(arguments)


class ProjectedRetriever(FineTunedRetriever):
    """A model of two published encoders, each with a head of two layers that projects to one width.

    A subclass sets `log_mel`, `audio_encoder` and `text_encoder`, then adds the heads.

    Args:
        sample_rate: Sample rate of the waveforms in the batches, in Hz.
        model_rate: Sample rate that the audio encoder was trained with, in Hz.
        padding: `"masked"`: samples from `"num_samples"` on are ignored. `"heard"`: they are encoded like
            sound, so that a clip's embedding depends on the length of its batch.
        **options: Further arguments of `FineTunedRetriever`.

    Raises:
        ValueError: An argument is outside its range.
    """

    log_mel: LogMel
    audio_encoder: nn.Module
    text_encoder: TextEncoder

    def __init__(
        self, sample_rate: int, model_rate: int, *, padding: Padding = "masked", **options: Any
    ) -> None:
        super().__init__(sample_rate, model_rate, **options)
        check_choice("padding", padding, get_args(Padding))
        self.padding: Padding = padding

    @property
    def encoders(self) -> tuple[nn.Module, nn.Module]:
        """The audio encoder and the text encoder, without their heads."""
        return self.audio_encoder, self.text_encoder

    def add_heads(self, audio_width: int, text_width: int, head_width: int, width: int) -> None:
        """Add a head to each encoder, and freeze the encoders that shall be.

        Args:
            audio_width: Width of the audio encoder's output.
            text_width: Width of the text encoder's output.
            head_width: Width between the two layers of each head.
            width: d, width of the embeddings.
        """
        self.audio_head = projection_head(audio_width, head_width, width)
        self.text_head = projection_head(text_width, head_width, width)
        self.freeze_encoders()

    def compare_by(self, interaction: Interaction) -> None:
        """Compare clips and captions by an interaction, in the loss and in the metrics.

        Args:
            interaction: Interaction that becomes part of the model, as `interaction`.

        Raises:
            TypeError: The interaction needs frames, which the audio encoder does not return.
        """
        if interaction.needs_tokens and not callable(getattr(self.audio_encoder, "with_frames", None)):
            raise TypeError(
                f"{type(interaction).__name__} compares frames, but {type(self.audio_encoder).__name__} "
                "returns clips alone. Give it a method `with_frames`."
            )
        super().compare_by(interaction)

    def encode_audio(self, batch: Batch) -> Embeddings:
        """Encode the clips of a batch.

        Args:
            batch: A batch with `"waveform"`, and optionally `"num_samples"`, from where on samples are
                padding.

        Returns:
            `(B, d)`, L2-normalised; with an interaction of tokens, `TokenEmbeddings` of clips and frames.

        Raises:
            ValueError: The batch has no waveforms.
        """
        waveform, num_samples = self.resampled_waveforms(batch)
        num_frames = None
        if num_samples is not None and self.padding == "masked":
            num_frames = self.log_mel.num_frames(num_samples)
        spectrogram = self.log_mel(waveform)
        if self.needs_tokens:
            encoder: Any = self.audio_encoder
            clips, frames, inside = encoder.with_frames(spectrogram, num_frames)
            return at_unit_length((self.audio_head(clips), self.audio_head(frames), inside))
        return at_unit_length(self.audio_head(self.audio_encoder(spectrogram, num_frames)))

    def encode_text(self, batch: Batch) -> Embeddings:
        """Encode the captions of a batch.

        Args:
            batch: A batch with `"caption"`.

        Returns:
            `(B, d)`, L2-normalised; with an interaction of tokens, `TokenEmbeddings` of captions and tokens.
        """
        if self.needs_tokens:
            captions, tokens, inside = self.text_encoder.with_tokens(batch["caption"])
            return at_unit_length((self.text_head(captions), self.text_head(tokens), inside))
        return at_unit_length(self.text_head(self.text_encoder(batch["caption"])))


def at_unit_length(encoded: Tensor | tuple[Tensor, Tensor, Tensor]) -> Embeddings:
    """What an encoder made, as embeddings of length one in float32.

    Args:
        encoded: Clips or captions `(B, d)`, alone or with their frames or words `(B, L, d)` and which of them
            are no padding, `(B, L)` boolean.

    Examples:
        >>> at_unit_length(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    if isinstance(encoded, Tensor):
        return normalize(encoded.float(), dim=-1)
    whole, tokens, mask = encoded
    return TokenEmbeddings(normalize(whole.float(), dim=-1), normalize(tokens.float(), dim=-1), mask)


def embedding_spread(embeddings: Tensor) -> Tensor:
    """The embedding regulariser of ML-CLAP: how evenly vectors spread over their coordinates.

    With E the batch's embeddings it is mean |E_ij| / ‖E‖_F, in float32: for unit vectors between 1 / (d √B),
    where each has one coordinate that is not 0, and 1 / √(B d), where all are equally large.

    Reference: The public code of Yan et al., "Bridging Language Gaps in Audio-Text Retrieval" (arXiv
    2406.07012), `embed_regularization`.

    Args:
        embeddings: `(B, d)`.

    Returns:
        0-d.

    Examples:
        >>> embedding_spread(torch.tensor([[1.0, 0.0]]))
        tensor(0.5000)
    """
    values = embeddings.float()
    return values.abs().mean() / values.square().sum().sqrt()


def batch_waveforms(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The waveforms of a batch and their lengths.

    Args:
        batch: A batch with `"waveform"` `(B, T)` and optionally `"num_samples"` `(B,)`.

    Returns:
        `(B, T)` waveforms, and `(B,)` lengths without padding, or None.

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
    return waveform, batch.get("num_samples")


def projection_head(input_width: int, hidden_width: int, output_width: int) -> nn.Sequential:
    """A head of two layers.

    Args:
        input_width: Width of the encoder's output.
        hidden_width: Width between the layers.
        output_width: Width of the head's output.

    Examples:
        >>> projection_head(6, 8, 4)(torch.zeros(2, 6)).shape
        torch.Size([2, 4])
    """
    return nn.Sequential(
        nn.Linear(input_width, hidden_width), nn.ReLU(), nn.Linear(hidden_width, output_width)
    )
