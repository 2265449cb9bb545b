"""Ranks by token-level similarity. Axes: `C` clips, `N` rows (one caption each), `L` tokens, `d` width."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ask_lightning.interaction import Similarities, TokenEmbeddings, as_similarities, rows_of
from ask_lightning.metrics.functional import (
    RetrievalRanks,
    by_clip,
    check_finite,
    check_rows,
    number_clips,
    step_back_in_ties,
)
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.non_finite import NonFiniteEmbeddingsError

# Scores are rounded to this share, so that one that is computed in two blocks ties with itself.
_SCORE_GRID = 2.0**-20


@torch.no_grad()
def interaction_ranks(
    audio: TokenEmbeddings,
    text: TokenEmbeddings,
    clip_ids: Tensor,
    interaction: Callable[[Any, Any], Similarities | Tensor],
    *,
    block_size: int = 256,
) -> RetrievalRanks:
    """Rank all captions for every clip and all clips for every caption, by an interaction.

    Ties count and rows of a clip belong together as in `retrieval_ranks`, but a clip is represented by one of
    its rows, the first: all are expected to hold the same audio. Scores are rounded to multiples of 2⁻²⁰. An
    interaction that is a module is used in evaluation mode.

    Two score matrices of N × C numbers are held in float64.

    Args:
        audio: Audio embeddings of N rows, of any length; they are brought to unit length here. Row i is the
            clip that caption i describes.
        text: Text embeddings of N rows. Row i is caption i.
        clip_ids: Ids of the clips, `(N,)` integers. Rows of one clip need not be adjacent.
        interaction: How texts and audios are compared.
        block_size: Number of captions that are compared with all clips at a time, at least 1.

    Returns:
        The ranks of each row, in the order of the rows.

    Raises:
        ValueError: Shapes or dtypes do not fit, there is no row, or an embedding or a score has NaN or Inf.

    Examples:
        >>> from ask_lightning.interaction import LateInteraction
        >>> clips = TokenEmbeddings(torch.eye(3), torch.eye(3)[:, None])
        >>> interaction_ranks(clips, clips, torch.arange(3), LateInteraction()).text_to_audio
        tensor([1, 1, 1])
    """
    check_rows(audio.pooled, text.pooled, clip_ids)
    if len(audio) == 0:
        raise ValueError(
            "Argument `audio` has to have at least one row, but got none. Pass one row for each caption."
        )
    check_count("block_size", block_size)
    for name, side in (("audio", audio), ("text", text)):
        check_finite(
            name, torch.cat([side.pooled, side.tokens.masked_fill(~side.valid[..., None], 0).flatten(1)], 1)
        )
    audio, text = (side.to(computation_dtype(side.pooled)).unit_length() for side in (audio, text))
    clips, sizes = number_clips(clip_ids)  # (N,), (C,)
    first = torch.full_like(sizes, len(clips)).scatter_reduce(
        0, clips, torch.arange(len(clips), device=clips.device), "amin"
    )  # (C,)
    to_audio, to_text = _scores(text, rows_of(audio, first), interaction, block_size)  # (N, C), (C, N)

    order = by_clip(
        clips, to_text[clips, torch.arange(len(clips), device=clips.device)].argsort(descending=True)
    )
    clips, to_audio, to_text = clips[order], to_audio[order], to_text[:, order]
    rows = torch.arange(len(clips), device=clips.device)
    own_clip, own_caption = to_audio[rows, clips], to_text[clips, rows]  # (N,)
    clips_ahead = (to_audio >= own_clip[:, None]).sum(dim=1)  # (N,)
    captions_ahead = torch.cat(
        [
            (to_text[clips[block]] >= own_caption[block, None]).sum(dim=1)
            for block in rows.split(block_size)  # (block, N)
        ]
    )
    captions_ahead = step_back_in_ties(clips, own_caption, captions_ahead)
    back = order.argsort()
    return RetrievalRanks(captions_ahead[back], clips_ahead[back], clips[back])


def _scores(
    text: TokenEmbeddings,
    audio: TokenEmbeddings,
    interaction: Callable[[Any, Any], Similarities | Tensor],
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """The rounded scores of all captions and clips in both directions, `(N, C)` and `(C, N)` float64."""
    to_audio, to_text = [], []
    with _in_evaluation_mode(interaction):
        for block in torch.arange(len(text), device=audio.pooled.device).split(block_size):
            found = as_similarities(interaction(rows_of(text, block), audio))
            _check_scores(found)
            to_audio.append(found.to_audio.double())
            to_text.append(found.to_text.double())
    return tuple(  # type: ignore[return-value]
        torch.cat(parts, dim=axis).div_(_SCORE_GRID).round_()
        for axis, parts in enumerate((to_audio, to_text))
    )


def _check_scores(scores: Similarities) -> None:
    """Refuse NaN, which is behind nothing, so that a partner with it would rank first."""
    if not all(direction.isfinite().all() for direction in scores[:2]):
        raise NonFiniteEmbeddingsError(
            "The interaction has to return finite scores, but returned NaN or Inf for finite embeddings. "
            "Look for divergence or overflow in its parameters."
        )


@contextmanager
def _in_evaluation_mode(interaction: object) -> Iterator[None]:
    """Put an interaction into evaluation mode for a while."""
    modes = (
        [(part, part.training) for part in interaction.modules()]
        if isinstance(interaction, nn.Module)
        else []
    )
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
