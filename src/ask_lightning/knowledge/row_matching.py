"""Which stored pairs the samples of a batch are. Axes: `B` batch, `m` rows of a clip, `d` width."""

from __future__ import annotations

import torch
from torch import Tensor

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.utilities.dtypes import computation_dtype


@torch.no_grad()
def match_rows(base: KnowledgeBase, ids: Tensor, text: Tensor) -> Tensor:
    """Find the stored pair of each sample by its clip, and by its caption where the clip has several pairs.

    Of a clip's pairs a sample is the one whose stored caption is nearest to the sample's: nothing else tells
    captions of a clip apart.

    Args:
        base: The base to search. Where it is sharded this is collective, and B may differ between ranks.
        ids: `(B,)` int64, the clips of the samples.
        text: `(B, d)`, the text embeddings of the samples.

    Returns:
        `(B,)` int64 global row numbers; -1 for a clip that is not stored.

    Examples:
        >>> base = KnowledgeBase.from_embeddings(torch.eye(3), torch.eye(3), ids=[7, 7, 4], num_prototypes=1)
        >>> match_rows(base, torch.tensor([7, 5]), torch.tensor([[0.1, 1.0, 0.0], [1.0, 0.0, 0.0]]))
        tensor([ 1, -1])
    """
    rows = base.rows_of_clips(ids)  # (B, m)
    if rows.shape[1] > 1:
        _, stored = base.fine.pairs(rows.clamp(min=0))  # (B, m, d)
        dtype = computation_dtype(stored)
        scores = torch.einsum("bd,bmd->bm", text.to(base.device, dtype), stored.to(dtype))  # (B, m)
        nearest = scores.masked_fill(rows < 0, -torch.inf).argmax(dim=1, keepdim=True)
        rows = rows.gather(1, nearest)
    return rows.squeeze(1)
