"""Which stored pairs the samples of a batch are.

Axes: `B` batch, `N` pairs, `m` rows of a clip, `d` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.utilities.dtypes import computation_dtype


@torch.no_grad()
def match_rows(base: KnowledgeBase, ids: Tensor, text: Tensor, caption_ids: Tensor | None = None) -> Tensor:
    """Find the stored pair of each sample, by the ids of its clip and its caption.

    Where these are not known of the samples or in the base, a sample is taken for the one of its clip's pairs
    whose stored caption is nearest to the sample's. That is another one for many samples of an encoder that
    is still to learn.

    Args:
        base: The base to search. Where it is sharded and captions have no ids this is collective, and B may
            differ between ranks.
        ids: `(B,)` int64, the clips of the samples.
        text: `(B, d)`, the text embeddings of the samples.
        caption_ids: `(B,)` int64, the captions of the samples.

    Returns:
        `(B,)` int64 global row numbers; -1 for a pair that is not stored.

    Examples:
        >>> base = KnowledgeBase.from_embeddings(torch.eye(3), torch.eye(3), ids=[7, 7, 4], num_prototypes=1)
        >>> match_rows(base, torch.tensor([7, 5]), torch.tensor([[0.1, 1.0, 0.0], [1.0, 0.0, 0.0]]))
        tensor([ 1, -1])
    """
    if caption_ids is not None and base.caption_ids is not None:
        return base.rows_of_pairs(ids, caption_ids)
    rows = base.rows_of_clips(ids)  # (B, m)
    if rows.shape[1] > 1:
        _, stored = base.fine.pairs(rows.clamp(min=0))  # (B, m, d)
        dtype = computation_dtype(stored)
        scores = torch.einsum("bd,bmd->bm", text.to(base.device, dtype), stored.to(dtype))  # (B, m)
        nearest = scores.masked_fill(rows < 0, -torch.inf).argmax(dim=1, keepdim=True)
        rows = rows.gather(1, nearest)
    return rows.squeeze(1)


def repeated_pairs(base: KnowledgeBase) -> Tensor:
    """The rows of a base whose clip and caption another row before them has as well.

    Args:
        base: A base with caption ids.

    Returns:
        Row numbers, ascending.

    Examples:
        >>> base = KnowledgeBase.from_embeddings(
        ...     torch.eye(3), torch.eye(3), ids=[7, 4, 7], caption_ids=[1, 1, 1], num_prototypes=1
        ... )
        >>> repeated_pairs(base)
        tensor([2])
    """
    assert base.caption_ids is not None
    by_caption = base.caption_ids.argsort(stable=True)
    order = by_caption[base.ids[by_caption].argsort(stable=True)]  # rows of a pair follow each other
    clips, captions = base.ids[order], base.caption_ids[order]
    is_repeated = (clips[1:] == clips[:-1]) & (captions[1:] == captions[:-1])
    return order[1:][is_repeated].sort().values


def agree(ids: Tensor | None, other: Tensor | None) -> bool:
    """Whether ids of rows are the same, as far as both are known.

    Args:
        ids: `(N,)` int64; `None` where they are not known.
        other: `(N,)` int64, those of other rows; `None` where they are not known.
    """
    return ids is None or other is None or torch.equal(ids, other)
