"""Texts and audios with padding anywhere, rows without tokens, and one interaction of each kind."""

import numpy as np
import torch
from torch import Tensor

from ask_lightning.interaction import (
    DotProductInteraction,
    FrameWiseInteraction,
    Interaction,
    LateInteraction,
    PrototypeAttention,
    StackedCrossAttention,
    TokenEmbeddings,
)
from tests.interaction import reference

WIDTH = 5
TOKEN_LEVEL = {
    "filip": lambda **options: LateInteraction(**options),
    "colbert": lambda **options: LateInteraction("sum", **options),
    "scan": lambda **options: StackedCrossAttention(**options),
    "scan mean": lambda **options: StackedCrossAttention(4.0, pooling="mean", **options),
    "prototypes": lambda **options: PrototypeAttention(WIDTH, 3, temperature=0.3, **options),
    "frame-wise": lambda **options: FrameWiseInteraction(WIDTH, **options),
    "frame-wise max": lambda **options: FrameWiseInteraction(WIDTH, pooling="max", **options),
}
ALL = {"dot product": lambda **options: DotProductInteraction()} | TOKEN_LEVEL


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> Interaction:
    """An interaction whose parameters have left their start."""
    torch.manual_seed(0)
    interaction = ALL[name](**options).to(dtype)
    with torch.no_grad():
        for parameter in interaction.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64).to(dtype))
    return interaction


def make_side(
    rows: int, length: int, seed: int, *, empty: bool = True, dtype: torch.dtype = torch.float64
) -> TokenEmbeddings:
    """Unit embeddings; the mask has holes, and the last row has no token if `empty`."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    tokens = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[:, 0] = True
    if empty:
        mask[-1] = False
    return TokenEmbeddings(pooled.to(dtype), tokens.to(dtype), mask).unit_length()


def tokens_of(side: TokenEmbeddings) -> list:
    """The tokens of each row without padding, as float64 arrays."""
    return [row[mask].double().numpy() for row, mask in zip(side.tokens.detach(), side.valid, strict=True)]


def leaves(side: TokenEmbeddings) -> tuple[TokenEmbeddings, list[Tensor]]:
    """A copy whose tensors collect gradients."""
    pooled, tokens = (part.detach().clone().requires_grad_() for part in (side.pooled, side.tokens))
    return TokenEmbeddings(pooled, tokens, side.mask), [pooled, tokens]


def expected(name, interaction, text, audio):
    """The matrices `(T, A)` and `(A, T)` of an interaction, pair by pair."""
    words, frames = tokens_of(text), tokens_of(audio)
    captions, clips = text.pooled.double().numpy(), audio.pooled.double().numpy()
    parameters = {key: value.detach().double().numpy() for key, value in interaction.named_parameters()}
    to_audio = np.empty((len(text), len(audio)))
    to_text = np.empty((len(audio), len(text)))
    for i in range(len(text)):
        for j in range(len(audio)):
            if name in ("filip", "colbert"):
                to_audio[i, j], to_text[j, i] = reference.late(words[i], frames[j], interaction.reduction)
                continue
            if name == "dot product":
                score = captions[i] @ clips[j]
            elif name.startswith("scan"):
                options = (interaction.attention_scale, interaction.pooling, interaction.pooling_scale)
                score = reference.attended(words[i], frames[j], *options)
            elif name == "prototypes":
                prototypes = parameters["prototypes"]
                unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
                score = reference.prototype(
                    words[i], frames[j], unit, parameters["inner"], parameters["outer"], 0.3
                )
            else:
                scale = np.exp(
                    captions[i] @ parameters["log_scale.weight"][0] + parameters["log_scale.bias"][0]
                )
                bias = captions[i] @ parameters["bias.weight"][0] + parameters["bias.bias"][0]
                score = reference.framewise(captions[i], frames[j], scale, bias, interaction.pooling)
            to_audio[i, j] = to_text[j, i] = score
    return to_audio, to_text
