"""Ranks and retrieval scores as pure functions. Axes: `C` clips, `N` rows (one caption each), `d` width."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ask_lightning.metrics.grid import mean_bias, mean_direction, unit_on_grid
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.non_finite import NonFiniteEmbeddingsError


class RetrievalRanks(NamedTuple):
    """The rank of each row's partner in both directions; 1 is best.

    Attributes:
        audio_to_text: Rank of the row's caption among all captions, with its clip as the query, `(N,)`. The
            captions of one clip have different ranks; the smallest is the clip's best rank.
        text_to_audio: Rank of the row's clip among all clips, with its caption as the query, `(N,)`.
        clips: Number of the row's clip in 0 … C-1, `(N,)`. Clips are numbered by their number of captions,
            then by id, whatever the order of the rows.
    """

    audio_to_text: Tensor
    text_to_audio: Tensor
    clips: Tensor


@torch.no_grad()
def retrieval_ranks(
    audio: Tensor,
    text: Tensor,
    clip_ids: Tensor,
    *,
    audio_bias: Tensor | None = None,
    text_bias: Tensor | None = None,
    audio_hubs: Tensor | None = None,
    text_hubs: Tensor | None = None,
    block_size: int = 2048,
) -> RetrievalRanks:
    """Rank all captions for every clip and all clips for every caption, by cosine similarity.

    Rows with the same id describe the same clip, which is one query and one candidate. Its embedding is
    the mean of its rows' unit vectors, so differing rows (random crops, say) count equally.

    A tie counts against the model: a candidate of another clip that scores as high as the query's own one
    ranks ahead of it. Captions of the same clip never push each other back: if they tie, they take
    consecutive ranks, in any order. A model that maps everything to one point thus ranks last, not first.

    With a bias the score is the cosine similarity minus the candidate's bias, as in search that is
    calibrated by `ask_lightning.functional.calibration.hub_bias`. Clips are ranked for a caption with
    `audio_bias`, captions for a clip with `text_bias`. With hubs as well, a bias acts only on the queries
    whose best hit by cosine is a hub, see `ask_lightning.functional.calibration.find_hubs`.

    One pass over blocks of the score matrix serves both directions, and with hubs one more pass before it. At
    most `block_size`² scores exist at a time; besides, the embeddings are held in float64.

    Args:
        audio: Audio embeddings `(N, d)` of any floating dtype and length. Row i is the clip that caption i
            describes. A row of zeros ties with everything.
        text: Text embeddings `(N, d)`. Row i is caption i.
        clip_ids: Ids of the clips, `(N,)` integers. Rows of one clip need not be adjacent.
        audio_bias: Bias of the clip of each row, `(N,)` floating, in units of the cosine. The rows of a clip
            are averaged. None: no bias.
        text_bias: Bias of each caption, `(N,)` floating. None: no bias.
        audio_hubs: Whether the clip of each row is a hub, `(N,)` boolean; one row of a clip is enough. None:
            `audio_bias` acts on all captions.
        text_hubs: Whether each caption is a hub, `(N,)` boolean. None: `text_bias` acts on all clips.
        block_size: Side of the largest block of scores, at least 1. It changes speed and memory, not ranks.

    Returns:
        The ranks of each row, in the order of the rows.

    Raises:
        ValueError: If shapes or dtypes do not fit, there is no row, an embedding or bias has NaN or Inf, or
            hubs are given without their bias.

    Examples:
        Two clips. The first has two captions, and the second one of them sounds like the other clip.

        >>> audio = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> text = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> ranks = retrieval_ranks(audio, text, clip_ids=torch.tensor([7, 8, 7]))
        >>> ranks.audio_to_text
        tensor([1, 1, 2])
        >>> ranks.text_to_audio
        tensor([1, 1, 2])
    """
    check_rows(audio, text, clip_ids)
    if len(audio) == 0:
        raise ValueError(
            "Argument `audio` has to have at least one row, but got none. Pass one row for each caption."
        )
    check_count("block_size", block_size)
    check_finite("audio", audio)
    check_finite("text", text)
    _check_bias("audio", audio_bias, audio_hubs, len(audio))
    _check_bias("text", text_bias, text_hubs, len(audio))

    # Clips with more captions come first, for `_count_ahead`.
    clips, sizes = number_clips(clip_ids)  # (N,), (C,)
    audio = mean_direction(audio, clips, len(sizes))  # (C, d)
    text = unit_on_grid(text)  # (N, d)
    pairs = zip(torch.split(clips, block_size), torch.split(text, block_size), strict=True)
    own = torch.cat([torch.linalg.vecdot(audio[clip], caption) for clip, caption in pairs])  # (N,)
    clip_hubs = None if audio_hubs is None else clips[audio_hubs].bincount(minlength=len(sizes)) > 0  # (C,)
    gate_of_captions, gate_of_clips = _open_gates(audio, text, clip_hubs, text_hubs, block_size)  # (N,), (C,)
    bias_of_clips = mean_bias(audio_bias, clips, len(sizes))  # (C,)
    bias_of_captions = mean_bias(text_bias, torch.arange(len(text), device=text.device), len(text))  # (N,)
    own_caption = own_clip = own  # (N,)
    if bias_of_captions is not None:
        own_caption = own - bias_of_captions * gate_of_clips[clips]
    if bias_of_clips is not None:
        own_clip = own - bias_of_clips[clips] * gate_of_captions

    order = by_clip(clips, own_caption.argsort(descending=True))  # (N,)
    clips, text, own_caption, own_clip = clips[order], text[order], own_caption[order], own_clip[order]
    to_clips = None if bias_of_clips is None else _Bias(bias_of_clips, gate_of_captions[order])
    to_captions = None if bias_of_captions is None else _Bias(bias_of_captions[order], gate_of_clips)
    captions_ahead, clips_ahead = _count_ahead(
        audio, text, own_caption, own_clip, to_clips, to_captions, sizes, block_size
    )  # (N,)

    captions_ahead = step_back_in_ties(clips, own_caption, captions_ahead)  # (N,)
    back = order.argsort()
    return RetrievalRanks(captions_ahead[back], clips_ahead[back], clips[back])


def retrieval_scores(
    ranks: RetrievalRanks, top_k: Sequence[int] = (1, 5, 10), map_k: int = 10
) -> dict[str, Tensor]:
    """Recall, mean average precision and median rank of both directions.

    | key | meaning | range |
    |---|---|---|
    | `a2t/recall_at_{k}` | share of clips with at least one own caption at rank ≤ k | [0, 1] |
    | `a2t/map_at_{map_k}` | mean over clips of their average precision, cut at map_k | [0, 1] |
    | `a2t/median_rank` | median over clips of the best own rank | ≥ 1 |
    | `t2a/recall_at_{k}` | share of captions whose clip is at rank ≤ k | [0, 1] |
    | `t2a/map_at_{map_k}` | mean over captions of 1 / rank, 0 beyond map_k | [0, 1] |
    | `t2a/median_rank` | median over captions of their clip's rank | ≥ 1 |

    The average precision of a clip with n captions is Σ (own captions up to rank r) / r over the ranks
    r ≤ map_k of own captions, divided by n, so it cannot reach 1 if n exceeds map_k. The median of an even
    number of ranks is the mean of the two in the middle.

    Args:
        ranks: Ranks that `retrieval_ranks` returned.
        top_k: Cut-offs of the recalls, each at least 1.
        map_k: Cut-off of the mean average precision, at least 1.

    Returns:
        0-d float32 tensors under the keys of the table, in its order.

    Examples:
        One clip with two captions at ranks 3 and 1: its average precision is (1/1 + 2/3) / 2.

        >>> ranks = RetrievalRanks(torch.tensor([3, 1]), torch.tensor([1, 2]), clips=torch.tensor([0, 0]))
        >>> scores = retrieval_scores(ranks, top_k=[1])
        >>> {name: round(score.item(), 3) for name, score in scores.items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'a2t/recall_at_1': 1.0, 'a2t/map_at_10': 0.833, 'a2t/median_rank': 1.0,
         't2a/recall_at_1': 0.5, 't2a/map_at_10': 0.75, 't2a/median_rank': 1.5}
    """
    order = by_clip(ranks.clips, ranks.audio_to_text.argsort())  # (N,)
    clips, rank = ranks.clips[order], ranks.audio_to_text[order]
    sizes = clips.bincount()  # (C,)
    first = sizes.cumsum(0) - sizes  # (C,)
    place = torch.arange(1, len(rank) + 1, device=rank.device) - first[clips]  # (N,), 1 for a clip's best
    # Sums run in this order or in that of the sorted ranks, never in that of the rows, so that even the last
    # bit of a mean does not depend on the order of the rows.
    precision = (place / rank.double()).where(rank <= map_k, 0.0) / sizes[clips]  # (N,)
    average_precision = {"a2t": precision.sum() / len(sizes)}
    queries = {"a2t": rank[first].sort().values, "t2a": ranks.text_to_audio.sort().values}  # (C,), (N,)
    average_precision["t2a"] = (1 / queries["t2a"].double()).where(queries["t2a"] <= map_k, 0.0).mean()

    scores = {}
    for direction, best in queries.items():
        for k in top_k:
            scores[f"{direction}/recall_at_{k}"] = (best <= k).double().mean()
        scores[f"{direction}/map_at_{map_k}"] = average_precision[direction]
        middle = best[[(len(best) - 1) // 2, len(best) // 2]]  # (2,), twice the same if there is one
        scores[f"{direction}/median_rank"] = middle.double().mean()
    return {name: score.float() for name, score in scores.items()}


def merge_duplicates(
    audio: Tensor, text: Tensor, clip_ids: Tensor, caption_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge rows with the same clip and caption, such as those that a sampler repeats as padding.

    Args:
        audio: Audio embeddings `(N, d)`.
        text: Text embeddings `(N, d)`.
        clip_ids: Ids of the clips, `(N,)` integers.
        caption_ids: Ids of the captions, `(N,)` integers, unique at least within a clip: 0 … 4 for each
            clip is enough.

    Returns:
        `audio`, `text` and `clip_ids` with one row for each pair of ids, sorted by ids. The embeddings are
        the mean directions of the merged rows, in float64 and not normalised.

    Examples:
        >>> audio, text, clip_ids = merge_duplicates(
        ...     torch.ones(3, 2), torch.ones(3, 2), torch.tensor([5, 5, 5]), torch.tensor([0, 1, 0])
        ... )
        >>> clip_ids
        tensor([5, 5])
    """
    pairs, row = torch.unique(torch.stack([clip_ids, caption_ids], 1), dim=0, return_inverse=True)
    return mean_direction(audio, row, len(pairs)), mean_direction(text, row, len(pairs)), pairs[:, 0]


def check_rows(audio: Tensor, text: Tensor, clip_ids: Tensor) -> None:
    """Refuse embeddings and ids whose shapes or dtypes do not fit together.

    Args:
        audio: Audio embeddings, which have to be floating and `(N, d)`.
        text: Text embeddings, which have to be floating and of the shape of `audio`.
        clip_ids: Ids of the clips, which have to be integers and `(N,)`.

    Raises:
        ValueError: A shape or dtype does not fit.

    Examples:
        >>> check_rows(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 0]))
    """
    for name, rows in (("audio", audio), ("text", text)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"Argument `{name}` has to be a floating tensor of shape (rows, width), but got {rows.dtype} "
                f"of shape {tuple(rows.shape)}. Pool frames or tokens to one vector a row first."
            )
    if text.shape != audio.shape:
        raise ValueError(
            f"Argument `text` has to be of the same shape as `audio`, {tuple(audio.shape)}, but got "
            f"{tuple(text.shape)}. Pass one row for each caption and repeat the audio embedding of its clip."
        )
    if clip_ids.shape != audio.shape[:1] or clip_ids.is_floating_point() or clip_ids.dtype == torch.bool:
        raise ValueError(
            f"Argument `clip_ids` has to be integers of shape ({len(audio)},), one for each row, but got "
            f"{clip_ids.dtype} of shape {tuple(clip_ids.shape)}."
        )


def number_clips(clip_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Number clips by their number of captions, largest first, then by id.

    Args:
        clip_ids: Ids of the clips, `(N,)` integers.

    Returns:
        The number of each row's clip, `(N,)`, and the number of captions of each clip, `(C,)`.

    Examples:
        >>> number_clips(torch.tensor([7, 9, 9]))
        (tensor([1, 0, 0]), tensor([2, 1]))
    """
    _, clips, sizes = torch.unique(clip_ids, return_inverse=True, return_counts=True)  # (N,), (C,)
    sizes, largest_first = sizes.sort(descending=True, stable=True)  # (C,)
    return largest_first.argsort()[clips], sizes


def step_back_in_ties(clips: Tensor, own_caption: Tensor, captions_ahead: Tensor) -> Tensor:
    """Give tied captions of one clip, which have all counted each other, consecutive ranks.

    Args:
        clips: Number of each row's clip, `(N,)`, in order.
        own_caption: Score of each caption for its clip, `(N,)`, in falling order within each clip.
        captions_ahead: Number of captions that score at least as high, itself included, `(N,)`.

    Returns:
        The ranks, `(N,)`.

    Examples:
        >>> step_back_in_ties(torch.tensor([0, 0]), torch.tensor([0.5, 0.5]), torch.tensor([2, 2]))
        tensor([1, 2])
    """
    _, tie, tied = torch.unique_consecutive(
        torch.stack([clips.double(), own_caption]), dim=1, return_inverse=True, return_counts=True
    )
    behind_in_tie: Tensor = tied.cumsum(0)[tie] - torch.arange(1, len(tie) + 1, device=tie.device)  # (N,)
    return captions_ahead - behind_in_tie


def check_finite(name: str, rows: Tensor) -> None:
    """Refuse embeddings with NaN or Inf.

    Args:
        name: Name of the argument, for the message.
        rows: Embeddings `(N, d)`.

    Raises:
        NonFiniteEmbeddingsError: A row has NaN or Inf; a `ValueError`.

    Examples:
        >>> check_finite("audio", torch.ones(2, 3))
    """
    broken = int((~rows.isfinite()).any(1).sum())
    if broken:
        raise NonFiniteEmbeddingsError(
            f"Argument `{name}` has to be finite, but got NaN or Inf in {broken} of {len(rows)} rows, which "
            "have no rank. Look for divergence, overflow in half precision or empty inputs in the encoder."
        )


def _check_bias(side: str, bias: Tensor | None, hubs: Tensor | None, num_rows: int) -> None:
    """Refuse a bias that is not one finite number for each row, and hubs that are not one truth for each."""
    if hubs is not None and (bias is None or hubs.shape != (num_rows,) or hubs.dtype != torch.bool):
        without = " without it" if bias is None else ""
        raise ValueError(
            f"Argument `{side}_hubs` has to be a boolean tensor of shape ({num_rows},), beside "
            f"`{side}_bias`, but got {hubs.dtype} of shape {tuple(hubs.shape)}{without}."
        )
    if bias is None:
        return
    name = f"{side}_bias"
    if bias.shape != (num_rows,) or not bias.is_floating_point():
        raise ValueError(
            f"Argument `{name}` has to be a floating tensor of shape ({num_rows},), one number for each row, "
            f"but got {bias.dtype} of shape {tuple(bias.shape)}."
        )
    if not bias.isfinite().all():
        raise ValueError(f"Argument `{name}` has to be finite, but got NaN or Inf.")


class _Bias(NamedTuple):
    """What is subtracted from the scores of one direction.

    Attributes:
        of_candidates: Bias of each candidate, `(candidates,)`.
        gate_of_queries: 1 for a query that is calibrated and 0 for one that is not, `(queries,)`.
    """

    of_candidates: Tensor
    gate_of_queries: Tensor

    def of_block(self, queries: slice, candidates: slice) -> Tensor:
        """The bias of some queries and candidates, `(queries, candidates)`."""
        return self.gate_of_queries[queries, None] * self.of_candidates[candidates]


def _open_gates(
    audio: Tensor, text: Tensor, clip_hubs: Tensor | None, caption_hubs: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor]:
    """Find the queries whose best hit is a hub.

    Args:
        audio: Embeddings of the clips on the grid, `(C, d)`.
        text: Embeddings of the captions on the grid, `(N, d)`.
        clip_hubs: Whether each clip is a hub, `(C,)`, or None for an open gate.
        caption_hubs: Whether each caption is a hub, `(N,)`, or None for an open gate.
        block_size: Side of the largest block of scores.

    Returns:
        1 for a query whose best hit, or one that ties with it, is a hub, else 0, in float64: for each caption
        `(N,)`, and for each clip `(C,)`.
    """
    # The best score over hubs, and that over all candidates.
    of_captions, of_clips = (
        side.new_full((2, len(side)), -torch.inf if hubs is not None else 0.0)
        for side, hubs in ((text, clip_hubs), (audio, caption_hubs))
    )  # (2, N), (2, C)
    if clip_hubs is not None or caption_hubs is not None:
        for clip_block in _slices(len(audio), block_size):
            for block in _slices(len(text), block_size):
                scores = audio[clip_block] @ text[block].T  # (block, block)
                if clip_hubs is not None:
                    among = scores.masked_fill(~clip_hubs[clip_block, None], -torch.inf)
                    best = torch.stack([among.amax(0), scores.amax(0)])  # (2, block)
                    of_captions[:, block] = of_captions[:, block].maximum(best)
                if caption_hubs is not None:
                    among = scores.masked_fill(~caption_hubs[block], -torch.inf)
                    best = torch.stack([among.amax(1), scores.amax(1)])  # (2, block)
                    of_clips[:, clip_block] = of_clips[:, clip_block].maximum(best)
    return (of_captions[0] >= of_captions[1]).double(), (of_clips[0] >= of_clips[1]).double()


def _slices(length: int, block_size: int) -> list[slice]:
    """Consecutive slices of at most `block_size` that cover a length."""
    return [slice(begin, begin + block_size) for begin in range(0, length, block_size)]


def _count_ahead(
    audio: Tensor,
    text: Tensor,
    own_caption: Tensor,
    own_clip: Tensor,
    to_clips: _Bias | None,
    to_captions: _Bias | None,
    sizes: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Count the captions and the clips that score at least as high as each matching pair, itself included.

    Args:
        audio: Embeddings of the clips on the grid, `(C, d)`, clips with more captions first.
        text: Embeddings of the captions on the grid, `(N, d)`, sorted by clip.
        own_caption: Score of each caption for its clip as the query, `(N,)`.
        own_clip: Score of each caption's clip for the caption as the query, `(N,)`.
        to_clips: What is subtracted from the scores of clips with captions as the queries, or None.
        to_captions: What is subtracted from the scores of captions with clips as the queries, or None.
        sizes: Number of captions of each clip, `(C,)`.
        block_size: Side of the largest block of scores.

    Returns:
        For each row, `(N,)`: the number of such captions with its clip as the query, and the number of such
        clips with its caption as the query.
    """
    captions_ahead = torch.zeros_like(own_clip, dtype=torch.long)  # (N,)
    clips_ahead = torch.zeros_like(captions_ahead)  # (N,)
    first = sizes.cumsum(0) - sizes  # (C,), the row of each clip's first caption
    for clip_block in _slices(len(audio), block_size):
        queries, start, counts = audio[clip_block], first[clip_block], sizes[clip_block]
        # The clips that have a caption number `place` lead the block: compare with those rows only.
        having = [int((counts > place).sum()) for place in range(int(counts[0]))]
        for block in _slices(len(text), block_size):
            scores = queries @ text[block].T  # (block, block)
            clip_scores = scores if to_clips is None else scores - to_clips.of_block(block, clip_block).T
            # Sums in int32 are ten times faster on a CPU than in int64, and large enough for a block.
            clips_ahead[block] += (clip_scores >= own_clip[block]).sum(0, dtype=torch.int32)
            caption_scores = scores
            if to_captions is not None:
                caption_scores = scores - to_captions.of_block(clip_block, block)
            for place, count in enumerate(having):
                captions = start[:count] + place  # (count,)
                ahead = caption_scores[:count] >= own_caption[captions, None]  # (count, block)
                captions_ahead[captions] += ahead.sum(1, dtype=torch.int32)
    return captions_ahead, clips_ahead


def by_clip(clips: Tensor, order: Tensor) -> Tensor:
    """Sort row numbers by clip, keeping their order within each clip.

    Args:
        clips: Number of each row's clip, `(N,)`.
        order: Row numbers, `(N,)`.

    Examples:
        >>> by_clip(torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0]))
        tensor([1, 2, 0])
    """
    return order[clips[order].argsort(stable=True)]
