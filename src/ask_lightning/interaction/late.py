"""Late interaction: each token of the query finds its best token.

Axes: `T` texts, `A` audios, `W` words, `F` frames, `d` width.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from ask_lightning.interaction.base import MAX_ELEMENTS, Interaction, Similarities
from ask_lightning.interaction.blocks import blockwise
from ask_lightning.interaction.masked import masked_max, masked_mean, masked_sum
from ask_lightning.interaction.token_embeddings import TokenEmbeddings
from ask_lightning.utilities.arguments import check_choice, check_count
from ask_lightning.utilities.dtypes import computation_dtype

Reduction = Literal["mean", "sum"]


def late_similarity(
    text: TokenEmbeddings,
    audio: TokenEmbeddings,
    *,
    reduction: Reduction = "mean",
    max_elements: int = MAX_ELEMENTS,
) -> Similarities:
    """The mean or sum over the query's tokens of the best dot product with a token of the candidate.

        S^{T→A}_ij = mean_w max_f  x_iw · y_jf        S^{A→T}_ji = mean_f max_w  x_iw · y_jf

    with the words x_iw of text i and the frames y_jf of audio j. The two directions differ.

    Args:
        text: Words of T texts.
        audio: Frames of A audios.
        reduction: `"mean"` over the query's tokens (FILIP) or their `"sum"` (ColBERT).
        max_elements: Number of token–token scores that are held at a time.

    Returns:
        Similarities `(T, A)` and `(A, T)`. Those of a row without tokens are 0.

    References:
        FILIP (Yao et al., arXiv 2111.07783, Eq. 4 and 5); ColBERT (Khattab and Zaharia, arXiv 2004.12832,
        Eq. 3), which has queries of one kind only: here the rule serves both directions.

    Examples:
        >>> import torch
        >>> words = TokenEmbeddings(torch.eye(2)[:1], torch.eye(2)[None])
        >>> frames = TokenEmbeddings(torch.eye(2)[:1], torch.eye(2)[None, :1])
        >>> late_similarity(words, frames)
        Similarities(to_audio=tensor([[0.5000]]), to_text=tensor([[1.]]), are_symmetric=False)
    """
    to_audio, to_text = blockwise(
        partial(_score, reduce=masked_mean if reduction == "mean" else masked_sum),
        (text.tokens, text.valid),
        (audio.tokens, audio.valid),
        elements_per_pair=text.tokens.shape[1] * audio.tokens.shape[1],
        max_elements=max_elements,
    )
    return Similarities(to_audio, to_text.T)


def token_scores(text: Tensor, audio: Tensor) -> Tensor:
    """The dot products of all words with all frames.

    Args:
        text: Words `(T, W, d)` of any floating dtype.
        audio: Frames `(A, F, d)`.

    Returns:
        `(T, A, W, F)`, float32 or float64.
    """
    dtype = computation_dtype(text)
    flat = text.to(dtype).flatten(0, 1) @ audio.to(dtype).flatten(0, 1).T  # (T W, A F)
    return flat.view(*text.shape[:2], *audio.shape[:2]).transpose(1, 2)  # (T, A, W, F)


def _score(
    text: Tensor,
    text_mask: Tensor,
    audio: Tensor,
    audio_mask: Tensor,
    *,
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Both directions of a block, `(T, A)` each."""
    scores = token_scores(text, audio)  # (T, A, W, F)
    words, frames = text_mask[:, None], audio_mask[None]  # (T, 1, W), (1, A, F)
    best_frame = masked_max(scores, frames[:, :, None])  # (T, A, W)
    best_word = masked_max(scores.transpose(2, 3), words[:, :, None])  # (T, A, F)
    return reduce(best_frame, words), reduce(best_word, frames)


class LateInteraction(Interaction):
    """Each token of the query finds its best token of the candidate, as in FILIP and ColBERT.

    Args:
        reduction: `"mean"` over the query's tokens (FILIP) or their `"sum"` (ColBERT). A sum grows with the
            number of the query's tokens, so that long queries get sharper distributions over candidates.
        max_elements: Number of token–token scores that are held at a time, at least 1. It changes speed and
            memory, not results.

    References:
        FILIP (arXiv 2111.07783), without its learned prompts and without dropping tokens; ColBERT (arXiv
        2004.12832), without its query augmentation.

    Examples:
        >>> import torch
        >>> clips = TokenEmbeddings(torch.eye(2), torch.eye(2)[:, None])
        >>> LateInteraction()(clips, clips).to_audio
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, reduction: Reduction = "mean", *, max_elements: int = MAX_ELEMENTS) -> None:
        super().__init__()
        check_choice("reduction", reduction, get_args(Reduction))
        check_count("max_elements", max_elements)
        self.reduction: Reduction = reduction
        self.max_elements = max_elements

    def extra_repr(self) -> str:
        """How the query's tokens are put together."""
        return f"reduction={self.reduction!r}"

    def similarities(self, text: TokenEmbeddings, audio: TokenEmbeddings) -> Similarities:
        """Two matrices that differ."""
        return late_similarity(text, audio, reduction=self.reduction, max_elements=self.max_elements)
