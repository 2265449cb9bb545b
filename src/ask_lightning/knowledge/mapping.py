"""Stored rows that follow the encoders by a map, fitted to a sample of rows that were encoded anew.

Axes: `n` rows of the sample, `N` rows, `d` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_lightning.functional.embedding_map import orthogonal_map, ridge_map
from ask_lightning.functional.injection import unit_length
from ask_lightning.functional.neighbor_recall import neighbor_recall
from ask_lightning.utilities.arguments import check_positive, check_range

# Share of the sample that maps are judged by, in rows that they were not fitted to.
_HELD_OUT_SHARE = 0.3
# So many rows tell recalls apart well enough.
_MOST_HELD_OUT = 2048
_NUM_NEIGHBORS = 10


@dataclass(frozen=True)
class MappedRefresh:
    """How `KnowledgeRefreshCallback(mode=...)` maps old rows to the present encoders.

    Args:
        sample_share: Share of the source that a refresh encodes, in (0, 1]; a hundred items at least.

    Raises:
        ValueError: The share is outside its range.

    Examples:
        >>> MappedRefresh(sample_share=0.2)
        MappedRefresh(sample_share=0.2)
    """

    sample_share: float = 0.1

    def __post_init__(self) -> None:
        check_positive("sample_share", self.sample_share)
        check_range("sample_share", self.sample_share, 0, 1)


@dataclass(frozen=True)
class RowMap:
    """A map of the rows of one modality, chosen by rows that it was not fitted to.

    Attributes:
        matrix: `(d, d)`; mapped rows are `unit(rows @ matrix)`. None: no map is better than the old rows,
            which stay.
        recall: Share of the held-out rows' true nearest neighbours that are found among their mapped rows.
        old_recall: Share of them that are found among the rows as they were.
    """

    matrix: Tensor | None
    recall: float
    old_recall: float

    @property
    def is_useful(self) -> bool:
        """Whether the rows follow the encoder, by a map, or because it has not moved."""
        return self.matrix is not None or self.old_recall == 1.0

    def __call__(self, rows: Tensor) -> Tensor:
        """Map rows.

        Args:
            rows: `(N, d)`, old unit vectors.

        Returns:
            `(N, d)`, unit vectors.
        """
        return rows if self.matrix is None else unit_length(rows @ self.matrix.to(rows))


@torch.no_grad()
def fit_row_map(old: Tensor, new: Tensor, held_out: Tensor) -> RowMap:
    """Fit an orthogonal map and one with a correction of low rank, and choose by held-out neighbours.

    Recall is that of the ten true nearest neighbours, of each held-out row among the others.

    Args:
        old: `(n, d)`, the sample as it is stored.
        new: `(n, d)`, the sample by the present encoders.
        held_out: `(n,)` boolean, rows to judge by, at least 2; the others, at least 1, are fitted to.

    Returns:
        The map.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> old = unit_length(torch.randn(60, 4, generator=generator))
        >>> turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
        >>> chosen = fit_row_map(old, old @ turn, torch.arange(60) < 20)
        >>> chosen.recall, torch.allclose(chosen(old), old @ turn, atol=1e-3)
        (1.0, True)
    """
    # In float64, so that machines choose alike; not every accelerator has it.
    old, new, held_out = old.cpu().double(), new.cpu().double(), held_out.cpu()
    fitted = ~held_out
    queries, own_rows = new[held_out], torch.arange(int(held_out.sum()))

    def recall(rows: Tensor) -> float:
        return float(neighbor_recall(queries, queries, rows, _NUM_NEIGHBORS, own_rows=own_rows))

    old_recall = recall(old[held_out])
    best = RowMap(None, old_recall, old_recall)
    rank = max(1, old.shape[1] // 4)
    rotation = orthogonal_map(old[fitted], new[fitted])
    for matrix in (rotation, ridge_map(old[fitted], new[fitted], rotation, rank=rank)):
        if (found := recall(unit_length(old[held_out] @ matrix))) > best.recall:
            best = RowMap(matrix, found, old_recall)
    return best


def choose_held_out(num_rows: int, rows_per_item: int, seed: int) -> Tensor:
    """Which rows of a sample maps are judged by: those of some items, so that no clip is on both sides.

    Args:
        num_rows: n, a multiple of `rows_per_item`.
        rows_per_item: Number of rows of each item, which stand behind one another.
        seed: Seed of the choice.

    Returns:
        `(n,)` boolean; false everywhere where the sample is too small to judge.

    Examples:
        >>> choose_held_out(100, 2, seed=0).sum()
        tensor(30)
    """
    items = num_rows // rows_per_item
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(items, dtype=torch.bool)
    count = min(round(_HELD_OUT_SHARE * items), -(-_MOST_HELD_OUT // rows_per_item))
    if count * rows_per_item > _NUM_NEIGHBORS:
        chosen[order[:count]] = True
    return chosen.repeat_interleave(rows_per_item)
