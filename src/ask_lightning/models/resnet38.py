"""ML-ACT: ResNet-38 of PANNs and BERT. Axes: `B` batch, `T` samples, `F` frames, `M` mels, `d` width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, dropout, relu

from ask_lightning.data.audio.features import LogMel
from ask_lightning.models.retriever import ProjectedRetriever
from ask_lightning.models.spec_augment import SpecAugment
from ask_lightning.models.text import TextEncoder
from ask_lightning.models.weights import find_file, load_weights, read_state_dict

SAMPLE_RATE = 32000
"""Of PANNs, in Hz."""

NUM_MELS = 64
"""Number of mel bins of PANNs."""

# Five poolings by two.
_REDUCTION = 32
# Its classifier and its own front end, whose filters and Fourier matrices are made anew here.
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
        channels: Of the four stages, each of which but the first halves time and frequency.
        blocks: Residual blocks of each stage.
        width: d, of the last convolutions and the output.
        dropout: In [0, 1).
        spec_augment: Whether SpecAugment masks spectrograms while training.

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
        if not 0 <= dropout < 1:
            raise ValueError(f"Argument `dropout` has to be in [0, 1), but got {dropout}.")
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

        The published model hears the padding of short clips. Here a clip with `num_frames` is encoded as if
        it were alone: before each convolution, what is beyond its end is 0, as beyond the end of a batch.

        Args:
            spectrogram: `(B, F, 64)` decibels, `F` at least 32.
            num_frames: `(B,)` integers, how many frames of each row are no padding. None: all.

        Returns:
            `(B, d)`, the mean over frequency, and of it the maximum plus the mean over time.
        """
        if num_frames is not None:
            num_frames = num_frames.clamp(_REDUCTION, spectrogram.shape[1])
        maps = spectrogram.to(self.bn0.weight.dtype).transpose(1, 2).unsqueeze(-1)  # (B, 64, F, 1)
        maps = self.bn0(maps).squeeze(-1).transpose(1, 2)  # (B, F, 64)
        maps = _cut(self.spec_augment(maps).unsqueeze(1), num_frames)  # (B, 1, F, 64)
        maps, num_frames = _halve(self.conv_block1(maps, num_frames), num_frames)
        maps = self._drop(maps)  # (B, channels, F / 2, 32)
        for layer in self.resnet.children():
            for block in layer.children():
                maps, num_frames = block(maps, num_frames)
        maps, num_frames = _halve(maps, num_frames)
        maps = self._drop(maps)  # (B, channels, F / 32, 2)
        maps = self._drop(self.conv_block_after1(maps, num_frames))  # (B, d, F / 32, 2)
        frames = maps.mean(dim=3)  # (B, d, F / 32)
        count = frames.shape[2] if num_frames is None else num_frames.unsqueeze(1)  # (B, 1)
        # What was cut is 0, which is no larger than anything after a ReLU.
        pooled: Tensor = frames.amax(dim=2) + frames.sum(dim=2) / count
        return pooled

    def load_published(self, path: str) -> None:
        """Load the checkpoint file of PANNs.

        Args:
            path: Of `ResNet38_mAP=0.434.pth`.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It is another file, or the sizes of this encoder are not the published ones.
        """
        file = find_file(path, argument="audio_weights", remedy=_REMEDY)
        load_weights(self, read_state_dict(file), source=str(file), skip=_NOT_NEEDED)

    def _drop(self, maps: Tensor) -> Tensor:
        return dropout(maps, self.dropout, self.training)


class ResNet38BERT(ProjectedRetriever):
    """ML-ACT: ResNet-38 of PANNs and BERT, both fine-tuned.

    The backbone of the paper's first tables. Batches are dicts with `"waveform"` `(B, T)` and perhaps
    `"num_samples"` `(B,)`, where padding starts, `"caption"`, a list of `B` texts, and `"clip_id"` `(B,)`.
    Its training clips gradients to a norm of 2: `Trainer(gradient_clip_val=2.0)`.

    Reference: Mei et al., "On Metric Learning for Audio-Text Cross-Modal Retrieval", Interspeech 2022 (arXiv
    2203.15537), and its public code.

    Args:
        audio_weights: Path of `ResNet38_mAP=0.434.pth` of PANNs. None: random weights.
        text_weights: Folder or hub name of BERT, such as `"bert-base-uncased"`, or of another encoder that
            `transformers.AutoModel` loads. None: random weights.
        text_config: Entries that replace those of the pretrained configuration, or, with random weights,
            the defaults of `"model_type"`, which is `"bert"` if not given.
        tokenizer: None: that of `text_weights`. Or a folder or hub name. `"hashed"`: one that needs no file,
            for random weights. `"checkpoint"`: it comes with the state dict that is loaded next.
        width: d, of the embeddings.
        head_width: Width between the two layers of each head.
        channels: Of the four stages of ResNet-38.
        blocks: Residual blocks of each stage.
        audio_width: Of the features of ResNet-38.
        sample_rate: Of the waveforms in the batches, in Hz. Others than 32,000 are resampled.
        spec_augment: Whether SpecAugment masks spectrograms while training.
        dropout: Of both encoders, in [0, 1).
        max_tokens: Longer captions are cut, at least 3.
        temperature: τ of the loss, above 0.
        learning_rate: Of Adam at the start, above 0.
        decay_epochs: The learning rate is multiplied by `decay_factor` each time so many epochs have passed.
        decay_factor: In (0, 1].

    Raises:
        FileNotFoundError: Weights or a tokenizer are not there; the message says what was tried.
        ValueError: An argument is outside its range, weights do not fit, or there is no tokenizer.
        ImportError: torchaudio or transformers is missing.

    Examples:
        A shrunken one:

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
        dropout: float = 0.2,
        max_tokens: int = 128,
        temperature: float = 0.07,
        learning_rate: float = 5e-5,
        decay_epochs: int = 20,
        decay_factor: float = 0.1,
    ) -> None:
        super().__init__(
            sample_rate,
            SAMPLE_RATE,
            temperature=temperature,
            learning_rate=learning_rate,
            decay_epochs=decay_epochs,
            decay_factor=decay_factor,
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
        self.replace_hyperparameters(audio_weights=None, **self.text_encoder.recipe)


class _ConvBlock(nn.Module):
    """Two convolutions with batch normalisation and ReLU."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__()
        self.conv1 = _convolution(incoming, outgoing, 3)
        self.bn1 = nn.BatchNorm2d(outgoing)
        self.conv2 = _convolution(outgoing, outgoing, 3)
        self.bn2 = nn.BatchNorm2d(outgoing)

    def forward(self, maps: Tensor, num_frames: Tensor | None) -> Tensor:
        maps = _cut(relu(self.bn1(self.conv1(maps))), num_frames)
        return _cut(relu(self.bn2(self.conv2(maps))), num_frames)


class _ResidualBlock(nn.Module):
    """Two convolutions beside an identity; to halve time and frequency, an average pooling before both."""

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
            # The published one pools here, first in the list.
            layers = nn.Identity(), _convolution(incoming, outgoing, 1), nn.BatchNorm2d(outgoing)
            self.downsample = nn.Sequential(*layers)

    def forward(self, maps: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
        identity = maps
        if self.downsample is not None:
            maps, num_frames = _halve(maps, num_frames)
            identity = self.downsample(maps)
        inner = _cut(relu(self.bn1(self.conv1(maps))), num_frames)
        inner = self.bn2(self.conv2(dropout(inner, self.dropout, self.training)))
        return _cut(relu(inner + identity), num_frames), num_frames


def _halve(maps: Tensor, num_frames: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Half of time and frequency; an odd frame at the end is dropped, wherever the end is."""
    if num_frames is not None:
        num_frames = num_frames // 2
    return _cut(avg_pool2d(maps, 2), num_frames), num_frames


def _cut(maps: Tensor, num_frames: Tensor | None) -> Tensor:
    """0 beyond the end of each row of `(B, channels, F, M)`."""
    if num_frames is None:
        return maps
    beyond = torch.arange(maps.shape[2], device=maps.device) >= num_frames.unsqueeze(1)  # (B, F)
    return maps.masked_fill(beyond[:, None, :, None], 0)


def _convolution(incoming: int, outgoing: int, size: int) -> nn.Conv2d:
    convolution = nn.Conv2d(incoming, outgoing, size, padding=size // 2, bias=False)
    nn.init.xavier_uniform_(convolution.weight)
    return convolution
