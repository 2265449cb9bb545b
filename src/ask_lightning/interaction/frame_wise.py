"""Frame-wise similarity: a caption against each frame. Axes: `T` texts, `A` audios, `F` frames, `d` width."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

from ask_lightning.interaction.base import MAX_ELEMENTS, Interaction, Similarities, as_similarities
from ask_lightning.interaction.blocks import blockwise
from ask_lightning.interaction.masked import masked_max, masked_mean
from ask_lightning.interaction.token_embeddings import TokenEmbeddings
from ask_lightning.utilities.arguments import check_choice, check_count, check_positive
from ask_lightning.utilities.dtypes import computation_dtype

FramePooling = Literal["mean", "max"]


def frame_similarity(
    text: Tensor,
    audio: TokenEmbeddings,
    scale: Tensor,
    bias: Tensor,
    *,
    pooling: FramePooling = "mean",
    max_elements: int = MAX_ELEMENTS,
) -> Tensor:
    """The score of each caption at each frame, pooled over the frames of a clip.

        S_ij = pool_f [ a_i (t_i · y_jf) + b_i ]

    Args:
        text: Pooled embeddings t of T texts, `(T, d)`.
        audio: Frames y of A audios.
        scale: Scale a > 0 of each text, `(T,)`.
        bias: Bias b of each text, `(T,)`.
        pooling: `"mean"` or `"max"` over frames.
        max_elements: Number of frame scores that are held at a time.

    Returns:
        `(T, A)`. The score of an audio without frames is the text's bias.

    References:
        FLAM (Wu et al., arXiv 2505.05335) for the scores of frames; pooling them is ours.

    Examples:
        >>> import torch
        >>> frames = TokenEmbeddings(torch.eye(2)[:1], torch.eye(2)[None])
        >>> frame_similarity(torch.eye(2), frames, torch.tensor([1.0, 2.0]), torch.zeros(2))
        tensor([[0.5000],
                [1.0000]])
    """
    (dots,) = blockwise(
        partial(_pooled_dots, pool=masked_mean if pooling == "mean" else masked_max),
        (text,),
        (audio.tokens, audio.valid),
        elements_per_pair=audio.tokens.shape[1],
        max_elements=max_elements,
    )
    # Scale and bias are the same for all frames of a clip, and the scale is positive: pooling comes first.
    return scale[:, None] * dots + bias[:, None]


def _pooled_dots(
    text: Tensor, audio: Tensor, audio_mask: Tensor, *, pool: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor]:
    """The pooled dot products of a block, `(T, A)`."""
    dtype = computation_dtype(text)
    dots = (text.to(dtype) @ audio.to(dtype).flatten(0, 1).T).view(len(text), *audio.shape[:2])  # (T, A, F)
    return (pool(dots, audio_mask),)


class FrameWiseInteraction(Interaction):
    """A caption against each frame of a clip, with a scale and a bias of its own, in the manner of FLAM.

    Published: the score of caption y at frame f is a(y) (t · y_f) + b(y), where small networks compute the
    scale a and the bias b from the caption's embedding, trained with a sigmoid loss on frames that are
    labelled with events; the bias stands for how frequent an event is and is left out at inference.

    Ours, as clip-level pairs have no such labels: the scores of frames are pooled to one of the clip; scale
    and bias are linear in the pooled embedding of the caption, the scale through an exponential; both are
    trained by the loss that uses the interaction, and both stay at inference. They start as constants. The
    bias cancels where candidates are audios; where they are texts it is what a text has against all audios.

    Args:
        width: d, width of the embeddings.
        pooling: `"mean"` or `"max"` over frames.
        initial_scale: Scale of all captions at the start, above 0. The loss divides by its temperature
            besides.
        max_elements: Number of frame scores that are held at a time, at least 1. It changes speed and memory,
            not results.

    References:
        FLAM (Wu et al., arXiv 2505.05335).

    Examples:
        >>> import torch
        >>> clips = TokenEmbeddings(torch.eye(2), torch.eye(2)[:, None])
        >>> FrameWiseInteraction(2)(clips, clips).to_audio.detach()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self,
        width: int,
        *,
        pooling: FramePooling = "mean",
        initial_scale: float = 1.0,
        max_elements: int = MAX_ELEMENTS,
    ) -> None:
        super().__init__()
        check_count("width", width)
        check_choice("pooling", pooling, get_args(FramePooling))
        check_positive("initial_scale", initial_scale)
        check_count("max_elements", max_elements)
        self.pooling: FramePooling = pooling
        self.max_elements = max_elements
        self.log_scale, self.bias = nn.Linear(width, 1), nn.Linear(width, 1)
        for head, start in ((self.log_scale, math.log(initial_scale)), (self.bias, 0.0)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, start)

    def extra_repr(self) -> str:
        """How frames are pooled."""
        return f"pooling={self.pooling!r}"

    def similarities(self, text: TokenEmbeddings, audio: TokenEmbeddings) -> Similarities:
        """One matrix for both directions."""
        embeddings = text.pooled.to(computation_dtype(text.pooled))
        scale, bias = (
            nn.functional.linear(
                embeddings, head.weight.to(embeddings.dtype), head.bias.to(embeddings.dtype)
            ).squeeze(1)
            for head in (self.log_scale, self.bias)
        )  # (T,) each
        return as_similarities(
            frame_similarity(
                embeddings, audio, scale.exp(), bias, pooling=self.pooling, max_elements=self.max_elements
            )
        )
