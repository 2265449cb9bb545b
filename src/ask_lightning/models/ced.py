"""ML-CLAP: CED and SONAR. Axes: `B` batch, `T` samples, `F` frames, `M` mels, `N` patches, `d` width."""

from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from ask_lightning.data.audio.features import LogMel
from ask_lightning.models.retriever import InteractionName, Padding, ProjectedRetriever
from ask_lightning.models.spec_augment import SpecAugment
from ask_lightning.models.text import TextEncoder
from ask_lightning.models.weights import find_file, load_weights, read_state_dict
from ask_lightning.utilities.arguments import check_choice, check_count

SAMPLE_RATE = 16000
"""Sample rate of CED, in Hz."""

NUM_MELS = 64
"""Number of mel bins of CED."""

PATCH = 16
"""Side length of a patch, in frames and in mel bins."""

_NOT_NEEDED = ("front_end.", "outputlayer.")
_REMEDY = (
    'Pass "mispeech/ced-base" with a network and without HF_HUB_OFFLINE, a folder that `hf download '
    "mispeech/ced-base --local-dir FOLDER` filled, or the path of audiotransformer_base_mAP_4999.pt from "
    "https://zenodo.org/records/8275347. Random weights have to be asked for: `audio_weights=None`."
)


class CED(nn.Module):
    """The audio transformer CED, up to its pooled features, under its published names.

    Reference: Dinkel et al., "CED: Consistent ensemble distillation for audio tagging", ICASSP 2024 (arXiv
    2308.11957).

    Args:
        width: d, width of the tokens and of the output: 768 in CED-Base, 384 in CED-Small, 256 in CED-Mini,
            192 in CED-Tiny.
        depth: Number of layers.
        heads: Number of attention heads, a divisor of `width`. The published models have one for each 64
            channels.
        max_frames: Largest number of frames that are encoded together. Longer clips are encoded in pieces of
            this length, whose features are averaged.
        spec_augment: Whether SpecAugment masks spectrograms in training. The public code of CED and of
            ML-CLAP trains without.
        padding: `"masked"`: patches of padding are neither attended to nor averaged. `"heard"`: as in the
            public code, padding is encoded like sound, the last piece of a long clip is filled with zeros and
            counts as much as the others, and a last piece that needs no filling is left out.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> encoder = CED(width=8, depth=1, heads=2)
        >>> encoder(torch.zeros(2, 101, 64)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        *,
        max_frames: int = 1012,
        spec_augment: bool = False,
        padding: Padding = "masked",
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"The number of attention heads of CED has to divide its width, but got {heads} heads for a "
                f"width of {width}."
            )
        check_count("max_frames", max_frames, PATCH)
        check_choice("padding", padding, get_args(Padding))
        self.max_frames = max_frames
        self.padding: Padding = padding
        self.init_bn = nn.BatchNorm2d(NUM_MELS, momentum=0.01)
        self.spec_augment = SpecAugment() if spec_augment else nn.Identity()
        self.patch_embed = _PatchEmbedding(width)
        self.time_pos_embed = nn.Parameter(0.02 * torch.randn(1, width, 1, max_frames // PATCH))
        self.freq_pos_embed = nn.Parameter(0.02 * torch.randn(1, width, NUM_MELS // PATCH, 1))
        self.blocks = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Encode spectrograms.

        Args:
            spectrogram: `(B, F, 64)` decibels, `F` at least 16. Frames of an incomplete patch at the end are
                dropped.
            num_frames: `(B,)` integers, length of each row without padding. None: rows have no padding. It is
                not used with `padding="heard"`.

        Returns:
            `(B, d)`: tokens are averaged within each piece, then the pieces are averaged.
        """
        return _pool_pieces(*self._encode_frames(spectrogram, num_frames))

    def with_frames(
        self, spectrogram: Tensor, num_frames: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode spectrograms, and each of their frames.

        A frame is the mean over frequency of the tokens of its patches, so that a clip of one piece is the
        mean of its frames.

        Args:
            spectrogram: `(B, F, 64)` decibels, `F` at least 16.
            num_frames: `(B,)` integers, length of each row without padding. None: rows have no padding. It is
                not used with `padding="heard"`, where all frames count.

        Returns:
            Features of clips `(B, d)`, those of their frames of 0.16 s `(B, L, d)`, the pieces of long clips
            one after another, and which of them are no padding, `(B, L)` boolean.
        """
        frames, inside = self._encode_frames(spectrogram, num_frames)
        return _pool_pieces(frames, inside), frames.flatten(1, 2), inside.flatten(1, 2)

    def _encode_frames(self, spectrogram: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frames `(B, pieces, columns of patches, d)`, and which of them are no padding."""
        normal = spectrogram.to(self.norm.weight.dtype).transpose(1, 2).unsqueeze(-1)  # (B, M, F, 1)
        normal = self.init_bn(normal).squeeze(-1).transpose(1, 2)  # (B, F, M)
        normal = self.spec_augment(normal).transpose(1, 2)  # (B, M, F)
        pieces = list(normal.split(self.max_frames, dim=2))
        if self.padding == "heard" and len(pieces) > 1 and pieces[-1].shape[2] == self.max_frames:
            pieces.pop()
        if len(pieces) > 1:
            pieces[-1] = pad(pieces[-1], (0, self.max_frames - pieces[-1].shape[2]))
        stacked = torch.stack(pieces, dim=1)  # (B, pieces, M, columns of spectra)
        inside = None
        if self.padding == "masked" and (num_frames is not None or len(pieces) > 1):
            if num_frames is None:
                num_frames = torch.full((len(normal),), normal.shape[2], device=normal.device)
            starts = self.max_frames * torch.arange(len(pieces), device=normal.device)
            patches = (num_frames.unsqueeze(1) - starts).clamp(0, stacked.shape[3]) // PATCH  # (B, pieces)
            patches[:, 0].clamp_(min=1)
            columns = torch.arange(stacked.shape[3] // PATCH, device=normal.device)
            inside = columns < patches.unsqueeze(2)  # (B, pieces, columns)
        attended = None
        if inside is not None:
            # A piece of padding counts for nothing, but its attention must not be empty.
            attended = inside | ~inside.any(dim=2, keepdim=True)  # (B, pieces, columns)
            attended = attended.flatten(0, 1).repeat(1, NUM_MELS // PATCH)  # (B pieces, N)
        tokens = self._encode_patches(stacked.flatten(0, 1), attended)  # (B pieces, N, d)
        frames = tokens.unflatten(1, (NUM_MELS // PATCH, -1)).mean(dim=1)  # (B pieces, columns, d)
        frames = frames.unflatten(0, stacked.shape[:2])  # (B, pieces, columns, d)
        return frames, torch.ones_like(frames[..., 0], dtype=torch.bool) if inside is None else inside

    def _encode_patches(self, normal: Tensor, inside: Tensor | None) -> Tensor:
        """Encode spectrograms `(B, M, F)` as tokens `(B, N, d)`; `inside` `(B, N)` is false for padding."""
        maps: Tensor = self.patch_embed(normal.unsqueeze(1))  # (B, d, M / 16, F / 16)
        maps = maps + self.time_pos_embed[..., : maps.shape[-1]] + self.freq_pos_embed
        tokens: Tensor = maps.flatten(2).transpose(1, 2)  # (B, N, d)
        mask = None if inside is None else inside[:, None, None, :]  # (B, 1, 1, N)
        for block in self.blocks:
            tokens = block(tokens, mask)
        normal_tokens: Tensor = self.norm(tokens)
        return normal_tokens

    def load_published(self, source: str) -> None:
        """Load published weights, in the format of the authors' code or of the Hugging Face hub.

        Args:
            source: Path of a file or of a folder with `model.safetensors`, or a name on the hub.

        Raises:
            FileNotFoundError: The weights were not found.
            ValueError: The file holds other weights, or this encoder does not have the published sizes.
        """
        file = find_file(source, argument="audio_weights", remedy=_REMEDY, hub_file="model.safetensors")
        load_weights(self, read_state_dict(file), source=source, skip=_NOT_NEEDED, rename=_module_weight_name)


class CEDSonar(ProjectedRetriever):
    """ML-CLAP: the audio transformer CED and the text encoder of SONAR, both fine-tuned.

    This is the second backbone of the paper's Table 1. Batches are dicts with `"waveform"` `(B, T)` and
    optionally `"num_samples"` `(B,)`, where padding starts, `"caption"`, a list of `B` texts, and `"clip_id"`
    `(B,)`.

    Reference: Yan et al., "Bridging Language Gaps in Audio-Text Retrieval", Interspeech 2024 (arXiv
    2406.07012), and its public code. The loss is NT-Xent with a fixed τ, as for the other models; the
    original's has `learn_temperature=True` and `embedding_regularizer=1`. The original hears padding, too:
    `padding="heard"`.

    Args:
        audio_weights: Weights of CED: `"mispeech/ced-base"`, a folder, or the path of the authors'
            checkpoint. None: random weights.
        text_weights: Folder or hub name of the weights of SONAR for transformers, such as
            `"cointegrated/SONAR_200_text_encoder"`. None: random weights.
        text_config: Entries of `transformers.M2M100Config` that override those of the pretrained
            configuration, or of the published one if the weights are random.
        tokenizer: Folder or hub name of the tokenizer. None: the tokenizer of `text_weights`. `"hashed"`: a
            tokenizer that needs no file, for random weights. `"checkpoint"`: the tokenizer in the state dict
            that is loaded next.
        language: Code of the captions' language.
        width: d, width of the embeddings.
        head_width: Width between the two layers of each head.
        audio_width: Width of CED.
        audio_depth: Number of layers of CED.
        audio_heads: Number of attention heads of CED.
        max_frames: Largest number of frames of 10 ms that CED encodes together. Longer clips are encoded in
            pieces.
        sample_rate: Sample rate of the waveforms in the batches, in Hz. Rates other than 16,000 are
            resampled.
        spec_augment: Whether SpecAugment masks spectrograms in training.
        padding: `"masked"` or `"heard"`: whether the padding of a batch is encoded like sound; see `CED`.
        activation_dropout: Dropout rate behind the activation in the feed-forward layers of SONAR, in [0, 1):
            0.1 in fairseq2, from which the original takes SONAR. None: that of the configuration, which is 0
            for the weights on the hub.
        max_tokens: Largest number of tokens of a caption, at least 3. Longer captions are truncated.
        interaction: How clips and captions are compared. `"prototypes"`: a `PrototypeAttention` of frames and
            words, in the manner of GPA. `"frames"`: a `FrameWiseInteraction`, in the manner of FLAM. None:
            dot product of the embeddings.
        temperature: τ of the loss, above 0.
        learn_temperature: Whether τ is a parameter that is trained, from this value on.
        embedding_regularizer: Weight of the embedding regulariser in the model's own loss, at least 0; see
            `Retriever`.
        learning_rate: Learning rate of Adam at the start, above 0.
        decay_epochs: Number of epochs after each of which the learning rate is multiplied by `decay_factor`.
        decay_factor: Factor of the learning rate, in (0, 1]. With 1 it stays constant.
        freeze_audio: Whether the audio encoder keeps its weights; its head is trained. A frozen encoder stays
            in evaluation mode: no dropout, no SpecAugment, and batch norm with its stored statistics.
        freeze_text: Whether the text encoder keeps its weights; its head is trained.

    Raises:
        FileNotFoundError: Weights or a tokenizer were not found; the message says what was tried.
        ValueError: An argument is outside its range, weights do not fit, or there is no tokenizer.
        ImportError: torchaudio or transformers is missing.

    Examples:
        A small model with random weights:

        >>> model = CEDSonar(
        ...     None,
        ...     None,
        ...     text_config={"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2},
        ...     tokenizer="hashed",
        ...     width=4,
        ...     head_width=8,
        ...     audio_width=8,
        ...     audio_depth=1,
        ...     audio_heads=2,
        ... )
        >>> model.encode_audio({"waveform": torch.zeros(2, 16000)}).shape
        torch.Size([2, 4])
        >>> model.encode_text({"caption": ["rain, then wind", "a dog barking"]}).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        audio_weights: str | None,
        text_weights: str | None,
        *,
        text_config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        language: str = "eng_Latn",
        width: int = 1024,
        head_width: int = 1024,
        audio_width: int = 768,
        audio_depth: int = 12,
        audio_heads: int = 12,
        max_frames: int = 1012,
        sample_rate: int = SAMPLE_RATE,
        spec_augment: bool = False,
        padding: Padding = "masked",
        activation_dropout: float | None = None,
        max_tokens: int = 128,
        interaction: InteractionName | None = None,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        embedding_regularizer: float = 0.0,
        learning_rate: float = 5e-5,
        decay_epochs: int = 4,
        decay_factor: float = 0.1,
        freeze_audio: bool = False,
        freeze_text: bool = False,
    ) -> None:
        super().__init__(
            sample_rate,
            SAMPLE_RATE,
            padding=padding,
            temperature=temperature,
            learn_temperature=learn_temperature,
            embedding_regularizer=embedding_regularizer,
            learning_rate=learning_rate,
            decay_epochs=decay_epochs,
            decay_factor=decay_factor,
            freeze_audio=freeze_audio,
            freeze_text=freeze_text,
        )
        self.save_hyperparameters()
        self.log_mel = LogMel(
            SAMPLE_RATE,
            window=512,
            hop=160,
            lowest=0,
            highest=8000,
            num_mels=NUM_MELS,
            scale="htk",
            dynamic_range=120,
            min_frames=PATCH,
        )
        self.audio_encoder = CED(
            audio_width,
            audio_depth,
            audio_heads,
            max_frames=max_frames,
            spec_augment=spec_augment,
            padding=padding,
        )
        if audio_weights is not None:
            self.audio_encoder.load_published(audio_weights)
        self.text_encoder = TextEncoder.sonar(
            text_weights,
            text_config,
            tokenizer,
            language=language,
            activation_dropout=activation_dropout,
            max_tokens=max_tokens,
        )
        self.add_heads(audio_width, self.text_encoder.width, head_width, width)
        self.compare_by_name(interaction, width)
        self.replace_hyperparameters(audio_weights=None, **self.text_encoder.offline_arguments)


def _pool_pieces(frames: Tensor, inside: Tensor) -> Tensor:
    """The mean over the pieces with sound `(B, d)` of the means of their frames `(B, pieces, columns, d)`."""
    count = inside.sum(dim=2, keepdim=True)  # (B, pieces, 1)
    means = (frames * inside.unsqueeze(3)).sum(dim=2) / count.clamp_min(1)  # (B, pieces, d)
    return means.sum(dim=1) / (count > 0).sum(dim=1)  # (B, d)


class _PatchEmbedding(nn.Module):
    """Splits a spectrogram into patches and embeds them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, PATCH, stride=PATCH)

    def forward(self, maps: Tensor) -> Tensor:
        patches: Tensor = self.proj(maps)
        return patches


class _Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), mask)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens


class _Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        split = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d / heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # (B, heads, N, d / heads) each
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (B, N, d)
        return projected


def _module_weight_name(published: str) -> str:
    """The name in `CED` of a weight that the hub publishes with a prefix, or the authors inside a list."""
    return published.removeprefix("encoder.").replace("init_bn.1.", "init_bn.")
