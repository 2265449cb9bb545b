"""Pairs refined by their neighbours before they are stored. Axes: `n` pairs of this rank, `d` width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_lightning.functional import unit_length
from ask_lightning.knowledge.exact_search import sort_candidates
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.search import build_search
from ask_lightning.knowledge.sharded_pairs import ShardedSearch
from ask_lightning.utilities.arguments import check_count, check_positive, check_range
from ask_lightning.utilities.dtypes import computation_dtype

# Pairs whose neighbours are held at a time.
_ROWS_PER_BLOCK = 4096


@dataclass(frozen=True)
class GraphRefinement:
    """Mixes each pair with the pairs that are nearest to it, in both modalities at once.

    Pairs are nodes, and each has an edge to its K nearest others by the mean of the audio–audio and the
    text–text cosine. With the softmax of these similarities as weights w:

        u'ᵢ = unit((1 - γ) uᵢ + γ Σₖ wₖ uₖ)      v'ᵢ = unit((1 - γ) vᵢ + γ Σₖ wₖ vₖ)

    References:
        Not of ASK's published equations: one step of a graph convolution without weights to learn.

    Args:
        num_neighbors: K, number of neighbours of each pair, at least 1; all others if there are fewer.
        share: γ in [0, 1], the neighbours' share.
        temperature: Temperature of the softmax of similarities, above 0.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> audio = text = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> refined, _ = GraphRefinement(num_neighbors=1, share=0.5)(audio, text, RowShard.unsharded(3))
        >>> refined[0]  # half-way to the second
        tensor([0.9487, 0.3162])
    """

    num_neighbors: int = 5
    share: float = 0.3
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_count("num_neighbors", self.num_neighbors, 1)
        check_range("share", self.share, 0, 1)
        check_positive("temperature", self.temperature)

    @torch.no_grad()
    def __call__(self, audio: Tensor, text: Tensor, shard: RowShard) -> tuple[Tensor, Tensor]:
        """Refine the pairs of this rank; collective.

        Every pair is compared with every other, which takes time in proportion to N² d.

        Args:
            audio: `(n, d)`, this rank's audio embeddings.
            text: `(n, d)`, this rank's text embeddings.
            shard: Which rows of the whole table these are.

        Returns:
            Both, refined, `(n, d)` unit vectors. A pair that is alone stays as it is.
        """
        dtype = computation_dtype(audio)
        audio, text = unit_length(audio.to(dtype)), unit_length(text.to(dtype))
        num_neighbors = min(self.num_neighbors, shard.num_rows - 1)
        if num_neighbors < 1:
            return audio, text
        joint = torch.cat([audio, text], dim=1) / 2**0.5  # (n, 2d), whose products are mean cosines
        search = ShardedSearch(shard, build_search(joint, "auto") if len(joint) else None)
        own_rows = shard.global_rows().to(audio.device)  # (n,)
        refined = []
        # Every rank takes as many turns as the one with most rows, because each turn is collective.
        for start in range(0, max(shard.counts), _ROWS_PER_BLOCK):
            block = slice(start, start + _ROWS_PER_BLOCK)
            scores, rows = search(joint[block], num_neighbors + 1)
            scores = scores.masked_fill(rows == own_rows[block, None], -torch.inf)
            scores, rows = (side[:, :num_neighbors] for side in sort_candidates(scores, rows))  # (b, K)
            weights = (scores / self.temperature).softmax(dim=1).unsqueeze(2)  # (b, K, 1)
            neighbors = shard.fetch(rows, audio, text)  # (b, K, d) each
            refined.append(
                [
                    unit_length((1 - self.share) * side[block] + self.share * (weights * near).sum(dim=1))
                    for side, near in zip((audio, text), neighbors, strict=True)
                ]
            )
        refined_audio, refined_text = (torch.cat(blocks) for blocks in zip(*refined, strict=True))
        return refined_audio, refined_text
