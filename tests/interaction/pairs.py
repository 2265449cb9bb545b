"""Texts and audios with padding anywhere, rows without tokens, and one interaction of each kind."""

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
