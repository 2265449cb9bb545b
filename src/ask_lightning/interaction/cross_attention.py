"""Stacked cross attention: each word attends to frames.

Axes: `T` texts, `A` audios, `W` words, `F` frames, `d` width.
"""

from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ask_lightning.interaction.base import MAX_ELEMENTS, Interaction, Similarities, as_similarities
from ask_lightning.interaction.blocks import blockwise
from ask_lightning.interaction.late import token_scores
from ask_lightning.interaction.masked import masked_logsumexp, masked_mean, masked_softmax
from ask_lightning.interaction.token_embeddings import TokenEmbeddings
from ask_lightning.utilities.arguments import check_choice, check_count, check_positive
from ask_lightning.utilities.dtypes import computation_dtype

WordPooling = Literal["logsumexp", "mean"]

# Squared lengths below this count as zero.
_SMALLEST_SQUARE = 1e-12


def attended_similarity(
    text: TokenEmbeddings,
    audio: TokenEmbeddings,
    *,
    attention_scale: float = 9.0,
    pooling: WordPooling = "logsumexp",
    pooling_scale: float = 6.0,
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """How well each word agrees with the frames that it attends to, over all words.

    With the words x_w and the frames y_f of a pair, s_wf = x_w · y_f:

        s̄_wf = [s_wf]₊ / sqrt(Σ_w [s_wf]₊²)      α_wf = softmax_f(λ₁ s̄_wf)      a_w = Σ_f α_wf y_f
        R_w = cos(x_w, a_w)      S = (1/λ₂) log Σ_w exp(λ₂ R_w)   or   S = mean_w R_w

    The attended vectors are never formed: the cosine follows from s and the products of frames with frames.

    Args:
        text: Words of T texts.
        audio: Frames of A audios.
        attention_scale: λ₁ > 0.
        pooling: `"logsumexp"` or `"mean"` over words. The first is not divided by the number of words, as
            published, so that it exceeds 1 and grows with the length of a caption.
        pooling_scale: λ₂ > 0, for `"logsumexp"`.
        max_elements: Number of token–token scores that are held at a time.

    Returns:
        `(T, A)`, for both directions. Similarities of a row without tokens are 0 with `"mean"`; with
        `"logsumexp"` that is so for texts, and an audio without frames has R_w = 0 for each word.

    References:
        SCAN (Lee et al., arXiv 1803.08024), its text–image formulation, with frames for image regions. There
        s is the cosine; here it is the dot product, which is the same for unit vectors.

    Examples:
        >>> words = TokenEmbeddings(torch.eye(2)[:1], torch.eye(2)[None])
        >>> attended_similarity(words, words, attention_scale=100.0, pooling="mean")
        tensor([[1.]])
    """
    (scores,) = blockwise(
        partial(_score, attention_scale=attention_scale, pooling=pooling, pooling_scale=pooling_scale),
        (text.tokens, text.valid),
        (audio.tokens, audio.valid),
        elements_per_pair=text.tokens.shape[1] * audio.tokens.shape[1],
        max_elements=max_elements,
    )
    return scores


def _score(
    text: Tensor,
    text_mask: Tensor,
    audio: Tensor,
    audio_mask: Tensor,
    *,
    attention_scale: float,
    pooling: WordPooling,
    pooling_scale: float,
) -> tuple[Tensor]:
    """The similarities of a block, `(T, A)`."""
    dtype = computation_dtype(text)
    words, frames = text.to(dtype), audio.to(dtype).masked_fill(~audio_mask[..., None], 0)
    scores = token_scores(words, frames)  # (T, A, W, F)
    agreeing = scores.relu().masked_fill(~text_mask[:, None, :, None], 0)  # (T, A, W, F)
    # The clamp is below the root, whose gradient at 0 is infinite.
    length = agreeing.square().sum(dim=2, keepdim=True).clamp_min(_SMALLEST_SQUARE).sqrt()  # (T, A, 1, F)
    attention = masked_softmax(attention_scale * agreeing / length, audio_mask[None, :, None])  # (T, A, W, F)
    products = frames @ frames.transpose(1, 2)  # (A, F, F)
    of_frames = (torch.einsum("tawf,afg->tawg", attention, products) * attention).sum(dim=3)  # (T, A, W)
    of_words = words.square().sum(dim=2)[:, None]  # (T, 1, W)
    lengths = (of_frames.clamp_min(_SMALLEST_SQUARE) * of_words.clamp_min(_SMALLEST_SQUARE)).sqrt()
    relevance = (attention * scores).sum(dim=3) / lengths  # (T, A, W)
    if pooling == "mean":
        return (masked_mean(relevance, text_mask[:, None]),)
    return (masked_logsumexp(pooling_scale * relevance, text_mask[:, None]) / pooling_scale,)


class StackedCrossAttention(Interaction):
    """Each word attends to frames, and what it attends to is compared with it, as in SCAN.

    Args:
        attention_scale: λ₁ > 0, inverse temperature of the attention over frames.
        pooling: `"logsumexp"` over words, or their `"mean"`.
        pooling_scale: λ₂ > 0, the sharpness of `"logsumexp"`: the larger, the more the best word counts.
        max_elements: Number of token–token scores that are held at a time, at least 1. It changes speed and
            memory, not results.

    References:
        SCAN (arXiv 1803.08024), text–image formulation; `attended_similarity` has the equations. The
        published loss is a triplet loss; here the similarities serve any loss that takes an interaction.

    Examples:
        >>> clips = TokenEmbeddings(torch.eye(2), torch.eye(2)[:, None])
        >>> StackedCrossAttention(pooling="mean")(clips, clips).to_audio
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self,
        attention_scale: float = 9.0,
        *,
        pooling: WordPooling = "logsumexp",
        pooling_scale: float = 6.0,
        max_elements: int = MAX_ELEMENTS,
    ) -> None:
        super().__init__()
        check_positive("attention_scale", attention_scale)
        check_choice("pooling", pooling, get_args(WordPooling))
        check_positive("pooling_scale", pooling_scale)
        check_count("max_elements", max_elements)
        self.attention_scale = attention_scale
        self.pooling: WordPooling = pooling
        self.pooling_scale = pooling_scale
        self.max_elements = max_elements

    def extra_repr(self) -> str:
        """The options that change results."""
        names = ("attention_scale", "pooling", "pooling_scale")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def similarities(self, text: TokenEmbeddings, audio: TokenEmbeddings) -> Similarities:
        """One matrix for both directions."""
        return as_similarities(
            attended_similarity(
                text,
                audio,
                attention_scale=self.attention_scale,
                pooling=self.pooling,
                pooling_scale=self.pooling_scale,
                max_elements=self.max_elements,
            )
        )
