"""CLAP of transformers, fine-tuned. Axes: `B` batch, `T` samples, `F` frames, `M` mels, `d` width."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ask_lightning.data.audio.features import LogMel
from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.models.retriever import Batch, FineTunedRetriever
from ask_lightning.models.tokens import VocabularyTokenizer, make_tokenizer
from ask_lightning.models.weights import config_entries, make_config, pretrained_model
from ask_lightning.utilities.optional_imports import import_optional

SAMPLE_RATE = 48000
"""Sample rate of CLAP, in Hz."""

_HOP = 480
_WINDOW = 1024
_LOWEST, _HIGHEST = 50, 14000
_REMEDY = (
    "Unset HF_HUB_OFFLINE, or fetch it where there is a network with `hf download NAME --local-dir FOLDER` "
    'and pass the folder. Random weights have to be asked for: `weights=None` and `tokenizer="hashed"`.'
)


class CLAPRetriever(FineTunedRetriever):
    """A CLAP checkpoint of transformers, fine-tuned.

    Batches are dicts with `"waveform"` `(B, T)` and optionally `"num_samples"` `(B,)`, where padding starts,
    `"caption"`, a list of `B` texts, and `"clip_id"` `(B,)`. The spectrograms are those of transformers'
    `ClapFeatureExtractor`, computed in batches and on the device. Clips shorter than `max_seconds` are
    repeated. Of longer clips CLAP encodes a part: a random one in training, the middle one otherwise. A
    checkpoint with fusion also encodes the whole clip, compressed in time.

    The learned scales of CLAP's own loss are frozen and not used. With fusion, several processes need
    `strategy="ddp_find_unused_parameters_true"`, as a batch without a long clip does not use all weights.

    Reference: Wu et al., "Large-Scale Contrastive Language-Audio Pretraining with Feature Fusion and
    Keyword-to-Caption Augmentation", ICASSP 2023 (arXiv 2211.06687).

    Args:
        weights: Folder or hub name of the checkpoint, such as `"laion/clap-htsat-unfused"`. None: random
            weights.
        config: Entries of `transformers.ClapConfig`, such as `"text_config"` and `"audio_config"`, for random
            weights. It cannot be combined with `weights`.
        tokenizer: Folder or hub name of the tokenizer. None: the tokenizer of `weights`. `"hashed"`: a
            tokenizer that needs no file, for random weights. `"checkpoint"`: the tokenizer in the state dict
            that is loaded next.
        max_seconds: Length of audio that CLAP encodes, in seconds, above 0. CLAP was trained with 10.
        sample_rate: Sample rate of the waveforms in the batches, in Hz. Rates other than 48,000 are
            resampled.
        max_tokens: Largest number of tokens of a caption, at least 3. Longer captions are truncated.
        temperature: τ of the loss, above 0.
        learning_rate: Learning rate of Adam at the start, above 0.
        decay_epochs: Number of epochs after each of which the learning rate is multiplied by `decay_factor`.
        decay_factor: Factor of the learning rate, in (0, 1]. With 1 it stays constant.
        freeze_audio: Whether the audio encoder keeps its weights; its head is trained. A frozen encoder stays
            in evaluation mode: no dropout, and batch norm with its stored statistics.
        freeze_text: Whether the text encoder keeps its weights; its head is trained.

    Raises:
        FileNotFoundError: Weights or a tokenizer were not found; the message says what was tried.
        ValueError: An argument is outside its range, weights are incomplete, or there is no tokenizer.
        ImportError: torchaudio or transformers is missing.

    Examples:
        A small model with random weights:

        >>> model = CLAPRetriever(
        ...     None,
        ...     config={
        ...         "projection_dim": 4,
        ...         "text_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        ...         "audio_config": {
        ...             "num_mel_bins": 16,
        ...             "spec_size": 64,
        ...             "window_size": 4,
        ...             "patch_embeds_hidden_size": 4,
        ...             "hidden_size": 8,
        ...             "depths": [1, 1],
        ...             "num_attention_heads": [1, 2],
        ...         },
        ...     },
        ...     tokenizer="hashed",
        ...     max_seconds=2,
        ... )
        >>> model.encode_audio({"waveform": torch.zeros(2, 48000)}).shape
        torch.Size([2, 4])
        >>> model.encode_text({"caption": ["rain, then wind", "a dog barking"]}).shape
        torch.Size([2, 4])
    """

    transformers_part: ClassVar[str | None] = "model"

    def __init__(
        self,
        weights: str | None,
        *,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        max_seconds: float = 10.0,
        sample_rate: int = SAMPLE_RATE,
        max_tokens: int = 128,
        temperature: float = 0.07,
        learning_rate: float = 1e-5,
        decay_epochs: int = 20,
        decay_factor: float = 0.1,
        freeze_audio: bool = False,
        freeze_text: bool = False,
    ) -> None:
        super().__init__(
            sample_rate,
            SAMPLE_RATE,
            temperature=temperature,
            learning_rate=learning_rate,
            decay_epochs=decay_epochs,
            decay_factor=decay_factor,
            freeze_audio=freeze_audio,
            freeze_text=freeze_text,
        )
        self.save_hyperparameters()
        transformers = import_optional("transformers")
        if weights is None:
            entries = {name: value for name, value in (config or {}).items() if name != "model_type"}
            settings = make_config(transformers.ClapConfig(), entries, argument="config")
            self.model = transformers.ClapModel(settings).train()
        elif config is None:
            self.model = pretrained_model(transformers.ClapModel, weights, argument="weights", remedy=_REMEDY)
        else:
            raise ValueError(
                "Argument `config` is for random weights, but got `weights` too. Leave one of them out."
            )
        # NT-Xent has its own temperature; weights without a gradient stop DDP.
        self.model.logit_scale_a.requires_grad_(False)
        self.model.logit_scale_t.requires_grad_(False)
        self.freeze_encoders()

        audio_config = self.model.config.audio_config
        self.fusion = bool(audio_config.enable_fusion)
        self.max_samples = int(max_seconds * SAMPLE_RATE)
        self.max_seconds = max_seconds
        self.num_frames = self.max_samples // _HOP + 1
        most = audio_config.spec_size * (audio_config.spec_size // audio_config.num_mel_bins)
        if not (max_seconds > 0 and self.num_frames <= most):
            raise ValueError(
                f"Argument `max_seconds` has to be above 0 and at most {(most - 1) * _HOP / SAMPLE_RATE:g} "
                f"for this audio encoder, whose input has {most} frames of 10 ms, but got {max_seconds}."
            )
        self.log_mel = LogMel(
            SAMPLE_RATE,
            window=_WINDOW,
            hop=_HOP,
            lowest=_LOWEST,
            highest=_HIGHEST,
            num_mels=audio_config.num_mel_bins,
            scale="htk" if self.fusion else "slaney",
        )
        text_config = self.model.config.text_config
        self.tokenizer = make_tokenizer(tokenizer, weights, text_config, max_tokens=max_tokens)
        self.replace_hyperparameters(
            weights=None, config=config_entries(self.model.config), tokenizer=self.tokenizer.kind
        )

    @property
    def encoders(self) -> tuple[nn.Module, nn.Module]:
        """CLAP's audio model and text model; its two projections are the heads."""
        return self.model.audio_model, self.model.text_model

    def encode_audio(self, batch: Batch) -> Tensor:
        """Encode the clips of a batch.

        Args:
            batch: A batch with `"waveform"`, and optionally `"num_samples"`: later samples are ignored.

        Returns:
            `(B, d)`, L2-normalised.

        Raises:
            ValueError: The batch has no waveforms.
        """
        waveform, num_samples = self.resampled_waveforms(batch)
        if num_samples is None:
            num_samples = torch.full((len(waveform),), waveform.shape[1], device=waveform.device)
        channels, is_longer = self.spectrograms(waveform, num_samples.clamp(1, waveform.shape[1]))
        output = self.model.get_audio_features(input_features=channels, is_longer=is_longer)
        return normalize(as_embeddings(output, "get_audio_features").float(), dim=-1)

    def encode_text(self, batch: Batch) -> Tensor:
        """Encode the captions of a batch.

        Args:
            batch: A batch with `"caption"`.

        Returns:
            `(B, d)`, L2-normalised.
        """
        ids, mask = self.tokenizer(batch["caption"], self.model.device)  # (B, L) each
        output = self.model.get_text_features(input_ids=ids, attention_mask=mask)
        return normalize(as_embeddings(output, "get_text_features").float(), dim=-1)

    def save_processor(self, folder: Path) -> None:
        """Write the files of a `transformers.ClapProcessor`, with which transformers prepares the same input.

        Of clips that are longer than `max_seconds` its feature extractor takes a random part. With the hashed
        tokenizer, which transformers does not know, there is the feature extractor alone; unless
        `max_seconds` is an integer, there is none, and a warning says so.

        Args:
            folder: Folder that exists.
        """
        if self.max_seconds != int(self.max_seconds):
            rank_zero_warn(
                f"No processor of transformers is written: it hears whole seconds, not {self.max_seconds}. "
                "`CLAPRetriever.from_pretrained` needs none."
            )
            return
        transformers = import_optional("transformers")
        extractor = transformers.ClapFeatureExtractor(
            feature_size=self.model.config.audio_config.num_mel_bins,
            sampling_rate=SAMPLE_RATE,
            hop_length=_HOP,
            max_length_s=int(self.max_seconds),
            fft_window_size=_WINDOW,
            frequency_min=_LOWEST,
            frequency_max=_HIGHEST,
            truncation="fusion" if self.fusion else "rand_trunc",
            padding="repeatpad",
        )
        extractor.save_pretrained(folder)
        if isinstance(self.tokenizer, VocabularyTokenizer):
            processor = transformers.ClapProcessor(extractor, self.tokenizer.as_transformers())
            processor.save_pretrained(folder)
            self.tokenizer.save_files(folder)  # which the processor has replaced

    def spectrograms(self, waveform: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """The input of CLAP's audio encoder.

        Args:
            waveform: `(B, T)` at 48,000 Hz.
            num_samples: `(B,)` integers from 1 to T, length of each row without padding.

        Returns:
            `(B, 1, F, M)` decibels, with fusion `(B, 4, F, M)`; and `(B, 1)` boolean, true for clips that are
            longer than CLAP's input.
        """
        excess = (num_samples - self.max_samples).clamp_min(0)  # (B,)
        share = torch.rand(len(excess), device=excess.device) if self.training else 0.5
        start = (excess * share).long().unsqueeze(1)  # (B, 1)
        length = num_samples.unsqueeze(1)  # (B, 1)
        position = torch.arange(self.max_samples, device=waveform.device)  # (max_samples,)
        excerpt = waveform.gather(1, (start + position % length).clamp_max(length - 1))  # (B, max_samples)
        # A short clip is repeated as often as it fits as a whole; the rest is silence.
        silent = (position >= self.max_samples // length * length) & (excess == 0).unsqueeze(1)
        channels = self.log_mel(excerpt.masked_fill(silent, 0.0)).unsqueeze(1)  # (B, 1, F, M)
        if not self.fusion:
            return self._as_model_dtype(channels), (excess > 0).unsqueeze(1)
        channels = channels.repeat(1, 4, 1, 1)  # (B, 4, F, M)
        # A clip that is less than one frame too long is not fused.
        is_longer = num_samples // _HOP + 1 > self.num_frames
        for row in is_longer.nonzero().flatten().tolist():
            whole = self.log_mel(waveform[row : row + 1, : int(num_samples[row])])  # (1, F', M)
            channels[row] = torch.cat([self._compress(whole), self._crop_thirds(whole)])
        return self._as_model_dtype(channels), is_longer.unsqueeze(1)

    def _compress(self, whole: Tensor) -> Tensor:
        """The whole spectrogram `(1, F', M)`, interpolated to the length of CLAP's input."""
        size = (self.num_frames, whole.shape[-1])
        return interpolate(whole.unsqueeze(1), size, mode="bilinear", align_corners=False)[0]  # (1, F, M)

    def _crop_thirds(self, whole: Tensor) -> Tensor:
        """Three crops of a spectrogram `(1, F', M)`, one from each third of the possible starts."""
        places = torch.arange(whole.shape[1] - self.num_frames + 1).tensor_split(3)
        starts = []
        for third in places:
            options = third if len(third) else torch.zeros(1, dtype=torch.int64)
            chosen = torch.randint(len(options), ()) if self.training else len(options) // 2
            starts.append(int(options[chosen]))
        return torch.stack([whole[0, start : start + self.num_frames] for start in starts])  # (3, F, M)

    def _as_model_dtype(self, channels: Tensor) -> Tensor:
        return channels.to(self.model.logit_scale_a.dtype)
