"""ML-ACT: ResNet-38 of PANNs and BERT. Axes: `B` batch, `T` samples, `F` frames, `M` mels, `d` width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, dropout, relu

from ask_lightning.data.audio.features import LogMel
from ask_lightning.models.retriever import InteractionName, Padding, ProjectedRetriever
from ask_lightning.models.spec_augment import SpecAugment
from ask_lightning.models.text import TextEncoder
from ask_lightning.models.weights import find_file, load_weights, read_state_dict
from ask_lightning.utilities.arguments import check_fraction

SAMPLE_RATE = 32000
"""Sample rate of PANNs, in Hz."""

NUM_MELS = 64
"""Number of mel bins of PANNs."""

# Five poolings by two.
_REDUCTION = 32
# The classifier, and the front end, whose filters and Fourier matrices `LogMel` computes.
_NOT_NEEDED = ("fc1.", "fc_audioset.", "spectrogram_extractor.", "logmel_extractor.")
_REMEDY = (
    "Download ResNet38_mAP=0.434.pth of PANNs from https://zenodo.org/records/3987831 and pass its path. "
    "Random weights have to be asked for: `audio_weights=None`."
)


class ResNet38(nn.Module):
    """The audio encoder ResNet-38 of PANNs, up to its pooled features, under its published names.

    Reference: Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern
    Recognition", 2020 (arXiv 1912.10211).

    Args:
        channels: Number of channels of each of the four stages. All but the first halve time and frequency.
        blocks: Number of residual blocks of each stage.
        width: d, width of the last convolutions and of the output.
        dropout: Dropout rate, in [0, 1).
        spec_augment: Whether SpecAugment masks spectrograms in training.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> encoder = ResNet38(channels=(4, 4, 4, 4), blocks=(1, 1, 1, 1), width=8)
        >>> encoder(torch.zeros(2, 100, 64)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (3, 4, 6, 3),
        width: int = 2048,
        *,
        dropout: float = 0.2,
        spec_augment: bool = True,
    ) -> None:
        super().__init__()
        for name, values in (("channels", channels), ("blocks", blocks)):
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"Argument `{name}` has to be four positive numbers, but got {values}.")
        check_fraction("dropout", dropout)
        self.dropout = dropout
        self.bn0 = nn.BatchNorm2d(NUM_MELS)
        self.spec_augment = SpecAugment() if spec_augment else nn.Identity()
        self.conv_block1 = _ConvBlock(1, channels[0])
        self.resnet = nn.Sequential()
        for stage, (incoming, outgoing) in enumerate(zip((channels[0], *channels), channels, strict=False)):
            first = _ResidualBlock(incoming, outgoing, halve=stage > 0, dropout=dropout)
            rest = [_ResidualBlock(outgoing, outgoing, dropout=dropout) for _ in range(1, blocks[stage])]
            self.resnet.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.conv_block_after1 = _ConvBlock(channels[-1], width)

    def forward(self, spectrogram: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """Encode spectrograms.

        The published model encodes the padding of short clips as well. Here, with `num_frames`, a clip is
        encoded as if it were alone in the batch: before each convolution everything beyond its end is set to
        0, like the zero padding of the convolution itself.

        Args:
            spectrogram: `(B, F, 64)` decibels, `F` at least 32.
            num_frames: `(B,)` integers, length of each row without padding. None: rows have no padding.

        Returns:
            `(B, d)`: features are averaged over frequency; their maximum and mean over time are added.
        """
        return _pool_time(*self._encode_frames(spectrogram, num_frames))

    def with_frames(
        self, spectrogram: Tensor, num_frames: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode spectrograms, and each of their frames.

        A frame has the features of a clip that consists of it alone: maximum and mean over one frame.

        Args:
            spectrogram: `(B, F, 64)` decibels, `F` at least 32.
            num_frames: `(B,)` integers, length of each row without padding. None: rows have no padding.

        Returns:
            Features of clips `(B, d)`, those of their frames of 0.32 s `(B, F // 32, d)`, and which of them
            are no padding, `(B, F // 32)` boolean.
        """
        frames, count = self._encode_frames(spectrogram, num_frames)  # (B, d, F / 32)
        if count is None:
            inside = torch.ones_like(frames[:, 0], dtype=torch.bool)  # (B, F / 32)
        else:
            inside = torch.arange(frames.shape[2], device=frames.device) < count.unsqueeze(1)  # (B, F / 32)
        return _pool_time(frames, count), 2 * frames.transpose(1, 2), inside

    def _encode_frames(self, spectrogram: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features averaged over frequency, `(B, d, F / 32)`, and how many of each row are no padding."""
        if num_frames is not None:
            num_frames = num_frames.clamp(_REDUCTION, spectrogram.shape[1])
        maps = spectrogram.to(self.bn0.weight.dtype).transpose(1, 2).unsqueeze(-1)  # (B, 64, F, 1)
        maps = self.bn0(maps).squeeze(-1).transpose(1, 2)  # (B, F, 64)
        maps = _zero_padding(self.spec_augment(maps).unsqueeze(1), num_frames)  # (B, 1, F, 64)
        maps, num_frames = _halve_resolution(self.conv_block1(maps, num_frames), num_frames)
        maps = self._dropout(maps)  # (B, channels, F / 2, 32)
        for layer in self.resnet.children():
            for block in layer.children():
                maps, num_frames = block(maps, num_frames)
        maps, num_frames = _halve_resolution(maps, num_frames)
        maps = self._dropout(maps)  # (B, channels, F / 32, 2)
        maps = self._dropout(self.conv_block_after1(maps, num_frames))  # (B, d, F / 32, 2)
        return maps.mean(dim=3), num_frames  # (B, d, F / 32)

    def load_published(self, path: str) -> None:
        """Load the checkpoint file of PANNs.

        Args:
            path: Path of `ResNet38_mAP=0.434.pth`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file holds other weights, or this encoder does not have the published sizes.
        """
        file = find_file(path, argument="audio_weights", remedy=_REMEDY)
        load_weights(self, read_state_dict(file), source=str(file), skip=_NOT_NEEDED)

    def _dropout(self, maps: Tensor) -> Tensor:
        return dropout(maps, self.dropout, self.training)


class ResNet38BERT(ProjectedRetriever):
    """ML-ACT: ResNet-38 of PANNs and BERT, both fine-tuned.

    This is the main backbone of the paper. Batches are dicts with `"waveform"` `(B, T)` and optionally
    `"num_samples"` `(B,)`, where padding starts, `"caption"`, a list of `B` texts, and `"clip_id"` `(B,)`.
    The original training clips gradients to a norm of 2: `Trainer(gradient_clip_val=2.0)`.

    Reference: Mei et al., "On Metric Learning for Audio-Text Cross-Modal Retrieval", Interspeech 2022 (arXiv
    2203.15537), and its public code.

    Args:
        audio_weights: Path of the file `ResNet38_mAP=0.434.pth` of PANNs. None: random weights.
        text_weights: Folder or hub name of the weights of BERT, such as `"bert-base-uncased"`, or of another
            encoder that `transformers.AutoModel` loads. None: random weights.
        text_config: Entries that override those of the pretrained configuration, or, if the weights are
            random, the defaults of the entry `"model_type"` (`"bert"` if it is missing).
        tokenizer: Folder or hub name of the tokenizer. None: the tokenizer of `text_weights`. `"hashed"`: a
            tokenizer that needs no file, for random weights. `"checkpoint"`: the tokenizer in the state dict
            that is loaded next.
        width: d, width of the embeddings.
        head_width: Width between the two layers of each head.
        channels: Number of channels of each of the four stages of ResNet-38.
        blocks: Number of residual blocks of each stage.
        audio_width: Width of the features of ResNet-38.
        sample_rate: Sample rate of the waveforms in the batches, in Hz. Rates other than 32,000 are
            resampled.
        spec_augment: Whether SpecAugment masks spectrograms in training.
        padding: `"masked"`: a clip is encoded as if it were alone in its batch. `"heard"`: the padding of a
            batch is encoded like sound, as in the original.
        dropout: Dropout rate of both encoders, in [0, 1).
        max_tokens: Largest number of tokens of a caption, at least 3. Longer captions are truncated.
        interaction: How clips and captions are compared. `"prototypes"`: a `PrototypeAttention` of frames and
            words, in the manner of GPA. `"frames"`: a `FrameWiseInteraction`, in the manner of FLAM. None:
            dot product of the embeddings.
        temperature: τ of the loss, above 0.
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

        >>> model = ResNet38BERT(
        ...     None,
        ...     None,
        ...     text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        ...     tokenizer="hashed",
        ...     width=4,
        ...     head_width=8,
        ...     channels=(2, 2, 2, 2),
        ...     blocks=(1, 1, 1, 1),
        ...     audio_width=8,
        ... )
        >>> model.encode_audio({"waveform": torch.zeros(2, 32000)}).shape
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
        width: int = 1024,
        head_width: int = 2048,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (3, 4, 6, 3),
        audio_width: int = 2048,
        sample_rate: int = SAMPLE_RATE,
        spec_augment: bool = True,
        padding: Padding = "masked",
        dropout: float = 0.2,
        max_tokens: int = 128,
        interaction: InteractionName | None = None,
        temperature: float = 0.07,
        learning_rate: float = 5e-5,
        decay_epochs: int = 20,
        decay_factor: float = 0.1,
        freeze_audio: bool = False,
        freeze_text: bool = False,
    ) -> None:
        super().__init__(
            sample_rate,
            SAMPLE_RATE,
            padding=padding,
            temperature=temperature,
            learning_rate=learning_rate,
            decay_epochs=decay_epochs,
            decay_factor=decay_factor,
            freeze_audio=freeze_audio,
            freeze_text=freeze_text,
        )
        self.save_hyperparameters()
        self.log_mel = LogMel(
            SAMPLE_RATE,
            window=1024,
            hop=320,
            lowest=50,
            highest=14000,
            num_mels=NUM_MELS,
            scale="slaney",
            min_frames=_REDUCTION,
        )
        self.audio_encoder = ResNet38(
            channels, blocks, audio_width, dropout=dropout, spec_augment=spec_augment
        )
        if audio_weights is not None:
            self.audio_encoder.load_published(audio_weights)
        self.text_encoder = TextEncoder.bert(
            text_weights, text_config, tokenizer, dropout=dropout, max_tokens=max_tokens
        )
        self.add_heads(audio_width, self.text_encoder.width, head_width, width)
        self.compare_by_name(interaction, width)
        self.replace_hyperparameters(audio_weights=None, **self.text_encoder.offline_arguments)


def _pool_time(frames: Tensor, num_frames: Tensor | None) -> Tensor:
    """The maximum and the mean over time of `(B, d, F / 32)`, added."""
    count = frames.shape[2] if num_frames is None else num_frames.unsqueeze(1)  # (B, 1)
    # Padding is 0, which never exceeds what a ReLU returns.
    pooled: Tensor = frames.amax(dim=2) + frames.sum(dim=2) / count
    return pooled


class _ConvBlock(nn.Module):
    """Two convolutions with batch normalisation and ReLU."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__()
        self.conv1 = _convolution(incoming, outgoing, 3)
        self.bn1 = nn.BatchNorm2d(outgoing)
        self.conv2 = _convolution(outgoing, outgoing, 3)
        self.bn2 = nn.BatchNorm2d(outgoing)

    def forward(self, maps: Tensor, num_frames: Tensor | None) -> Tensor:
        maps = _zero_padding(relu(self.bn1(self.conv1(maps))), num_frames)
        return _zero_padding(relu(self.bn2(self.conv2(maps))), num_frames)


class _ResidualBlock(nn.Module):
    """Two convolutions with a skip connection; to halve time and frequency, average pooling comes first."""

    def __init__(self, incoming: int, outgoing: int, *, halve: bool = False, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv1 = _convolution(incoming, outgoing, 3)
        self.bn1 = nn.BatchNorm2d(outgoing)
        self.conv2 = _convolution(outgoing, outgoing, 3)
        self.bn2 = nn.BatchNorm2d(outgoing)
        # A block starts as the identity.
        nn.init.zeros_(self.bn2.weight)
        self.downsample: nn.Sequential | None = None
        if halve:
            # In the published model the pooling is the first of these layers; the identity keeps the names.
            layers = nn.Identity(), _convolution(incoming, outgoing, 1), nn.BatchNorm2d(outgoing)
            self.downsample = nn.Sequential(*layers)

    def forward(self, maps: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        identity = maps
        if self.downsample is not None:
            maps, num_frames = _halve_resolution(maps, num_frames)
            identity = self.downsample(maps)
        inner = _zero_padding(relu(self.bn1(self.conv1(maps))), num_frames)
        inner = self.bn2(self.conv2(dropout(inner, self.dropout, self.training)))
        return _zero_padding(relu(inner + identity), num_frames), num_frames


def _halve_resolution(maps: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Average pooling of time and frequency by two; an odd frame at the end of a clip is dropped."""
    if num_frames is not None:
        num_frames = num_frames // 2
    return _zero_padding(avg_pool2d(maps, 2), num_frames), num_frames


def _zero_padding(maps: Tensor, num_frames: Tensor | None) -> Tensor:
    """Set everything beyond the end of each row of `(B, channels, F, M)` to 0."""
    if num_frames is None:
        return maps
    beyond = torch.arange(maps.shape[2], device=maps.device) >= num_frames.unsqueeze(1)  # (B, F)
    return maps.masked_fill(beyond[:, None, :, None], 0)


def _convolution(incoming: int, outgoing: int, size: int) -> nn.Conv2d:
    """A convolution of `size` × `size` that keeps time and frequency."""
    convolution = nn.Conv2d(incoming, outgoing, size, padding=size // 2, bias=False)
    nn.init.xavier_uniform_(convolution.weight)
    return convolution
