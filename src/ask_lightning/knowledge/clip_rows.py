"""Clips as wholes, made of their rows at each lookup.

Axes: `N` rows, `B` batch, `m` rows of a clip, `d` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.pairs import PairStore
from ask_lightning.knowledge.stored_clips import ClipVectors


class ClipRows:
    """Finds clips among pairs without a copy of their rows, for pairs that lie in files.

    Args:
        pairs: The pairs.
        ids: `(N,)` int64, the clip of each.

    Examples:
        >>> from ask_lightning.knowledge.pairs import StoredPairs
        >>> rows = torch.eye(3)
        >>> clips = ClipRows(StoredPairs(rows, rows), torch.tensor([7, 3, 7]))
        >>> clips.find(torch.tensor([7, 4])).audio
        tensor([[0.7071, 0.0000, 0.7071],
                [0.0000, 0.0000, 0.0000]])
    """

    def __init__(self, pairs: PairStore, ids: Tensor) -> None:
        self._pairs = pairs
        self._ids, self._rows = ids.sort(stable=True)  # (N,) each
        self._most = int(self._ids.unique_consecutive(return_counts=True)[1].max())

    def find(self, ids: Tensor) -> ClipVectors:
        """Look clips up by id; collective where the pairs are sharded.

        Args:
            ids: `(B,)` int64, the clips; their number may differ between ranks.

        Returns:
            The unit mean of each clip's rows.
        """
        first = torch.searchsorted(self._ids, ids)
        behind = torch.searchsorted(self._ids, ids, right=True)
        places = first[:, None] + torch.arange(self._most, device=ids.device)  # (B, m)
        is_own = places < behind[:, None]
        rows = self._rows[places.clamp(max=len(self._rows) - 1)]
        audio, text = (
            unit_length((side.float() * is_own[:, :, None]).sum(dim=1)) for side in self._pairs.pairs(rows)
        )
        return ClipVectors(audio, text, behind > first)
