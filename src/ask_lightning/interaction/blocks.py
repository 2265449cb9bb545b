"""Scores of all pairs of two sides, block by block. Axes: `T` texts, `A` audios."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def blockwise(
    score: Callable[..., tuple[Tensor, ...]],
    text: Sequence[Tensor],
    audio: Sequence[Tensor],
    *,
    elements_per_pair: int,
    max_elements: int,
) -> tuple[Tensor, ...]:
    """Compute scores of all pairs with bounded memory, in the forward and in the backward pass.

    The backward pass computes each block a second time instead of keeping what the first time left: at 512
    pairs of 64 frames and 32 words, one matrix of token similarities would take 2 GiB. Up to rounding, values
    and gradients are those of a single block.

    Args:
        score: Function of the parts of `text` and those of `audio` that returns score matrices `(t, a)`.
        text: Tensors with T rows.
        audio: Tensors with A rows.
        elements_per_pair: Number of elements of the largest tensor inside `score`, for one pair.
        max_elements: Number of elements that this tensor shall have at most; a block has at least one pair.

    Returns:
        The score matrices, `(T, A)` each.

    Examples:
        >>> score = lambda text, audio: (text @ audio.T,)
        >>> blockwise(score, [torch.eye(3)], [torch.eye(3)], elements_per_pair=1, max_elements=2)
        (tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]]),)
    """
    columns = min(len(audio[0]), max(1, max_elements // elements_per_pair))
    rows = max(1, max_elements // (elements_per_pair * max(1, columns)))
    if rows >= len(text[0]) and columns >= len(audio[0]):
        return score(*text, *audio)
    # One split of each tensor, so that its gradient is put together once rather than once for each block.
    text_blocks = list(zip(*(part.split(rows) for part in text), strict=True))
    audio_blocks = list(zip(*(part.split(columns) for part in audio), strict=True))
    bands = []
    for text_block in text_blocks:
        band = [_recomputed(score, *text_block, *audio_block) for audio_block in audio_blocks]
        bands.append([torch.cat(matrices, dim=1) for matrices in zip(*band, strict=True)])
    return tuple(torch.cat(matrices) for matrices in zip(*bands, strict=True))


def _recomputed(score: Callable[..., tuple[Tensor, ...]], *parts: Tensor) -> tuple[Tensor, ...]:
    """The scores of a block, of which only the arguments are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return score(*parts)
    # Scores draw no random numbers.
    return checkpoint(score, *parts, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
