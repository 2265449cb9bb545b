"""`TokenEmbeddings`: pooled embeddings and those of tokens. Axes: `B` batch, `L` tokens, `d` width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ask_lightning.functional.injection import inject_knowledge, unit_length


@dataclass(frozen=True)
class TokenEmbeddings:
    """Embeddings of clips or captions, and those of their frames or words.

    Retrieval from the knowledge base is by the pooled embeddings; an `Interaction` also sees the tokens.

    Attributes:
        pooled: Embeddings of the clips or captions, `(B, d)`.
        tokens: Embeddings of their frames or words, `(B, L, d)`, in the space of the pooled ones.
        mask: Which tokens there are, `(B, L)` boolean, false for padding. A row without any token is allowed;
            its token-level similarity to everything is 0. None: there is no padding.

    Raises:
        ValueError: Shapes do not fit together, or the mask is not boolean.

    Examples:
        >>> clips = TokenEmbeddings(torch.ones(2, 4), torch.ones(2, 3, 4))
        >>> clips.valid
        tensor([[True, True, True],
                [True, True, True]])
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (
            self.pooled.ndim != 2
            or self.tokens.ndim != 3
            or self.tokens.shape[::2] != self.pooled.shape
            or self.tokens.shape[1] == 0
        ):
            raise ValueError(
                "Arguments `pooled` and `tokens` have to be of shapes (batch, width) and (batch, tokens, "
                f"width) with at least one token, but got {tuple(self.pooled.shape)} and "
                f"{tuple(self.tokens.shape)}. "
                "Project tokens to the width of the pooled embeddings."
            )
        if self.mask is not None and (
            self.mask.shape != self.tokens.shape[:2] or self.mask.dtype != torch.bool
        ):
            raise ValueError(
                f"Argument `mask` has to be boolean of shape {tuple(self.tokens.shape[:2])}, true for tokens "
                f"that are no padding, but got {self.mask.dtype} of shape {tuple(self.mask.shape)}."
            )

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def valid(self) -> Tensor:
        """Which tokens are no padding, `(B, L)` boolean."""
        if self.mask is None:
            return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
        return self.mask

    def detach(self) -> TokenEmbeddings:
        """The same embeddings outside of the graph."""
        return replace(self, pooled=self.pooled.detach(), tokens=self.tokens.detach())

    def to(self, target: torch.dtype | torch.device | str) -> TokenEmbeddings:
        """The same embeddings in another dtype or on another device.

        Args:
            target: Floating dtype, or device.
        """
        mask = self.mask
        if mask is not None and not isinstance(target, torch.dtype):
            mask = mask.to(target)
        return TokenEmbeddings(self.pooled.to(target), self.tokens.to(target), mask)

    def unit_length(self) -> TokenEmbeddings:
        """The embeddings with pooled ones and tokens at length one; zeros stay zero."""
        return replace(self, pooled=unit_length(self.pooled), tokens=unit_length(self.tokens))

    def inject(self, neighbors: Tensor, ratio: float, *, renormalize: bool = False) -> TokenEmbeddings:
        """Mix the mean of the retrieved neighbours into the pooled embeddings and into each of their tokens.

        Without `renormalize` all tokens of a row move by the same vector and shrink by the same factor, so
        that the frame that fits a word best stays the same as long as the words are not injected as well.

        Args:
            neighbors: `(B, K, d)`, the knowledge that each row retrieved in its own modality, or `(B, d)`,
                its mean over K.
            ratio: ρ in [0, 1], the share of knowledge.
            renormalize: Whether to bring the result back to unit length.
        """
        if ratio == 0:
            return self
        return replace(
            self,
            pooled=inject_knowledge(self.pooled, neighbors, ratio, renormalize=renormalize),
            tokens=inject_knowledge(self.tokens, neighbors, ratio, renormalize=renormalize),
        )


Embeddings = Tensor | TokenEmbeddings
"""What an encoder returns: pooled embeddings `(B, d)`, with those of tokens or without."""


def unit_embeddings(embeddings: Embeddings, dtype: torch.dtype) -> Embeddings:
    """The embeddings at length one, in a dtype; zeros stay zero.

    Args:
        embeddings: What an encoder returned.
        dtype: Floating dtype.

    Examples:
        >>> unit_embeddings(torch.tensor([[3, 4]]), torch.float32)
        tensor([[0.6000, 0.8000]])
    """
    converted = embeddings.to(dtype)
    return converted.unit_length() if isinstance(converted, TokenEmbeddings) else unit_length(converted)


def pooled(embeddings: Embeddings) -> Tensor:
    """The pooled embeddings `(B, d)`, with which knowledge is retrieved.

    Args:
        embeddings: What an encoder returned.

    Examples:
        >>> pooled(TokenEmbeddings(torch.eye(2), torch.ones(2, 3, 2)))
        tensor([[1., 0.],
                [0., 1.]])
    """
    return embeddings.pooled if isinstance(embeddings, TokenEmbeddings) else embeddings
