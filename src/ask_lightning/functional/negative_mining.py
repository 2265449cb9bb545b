"""Choice of hard negatives among retrieved items. Axes: `B` queries, `C` candidates, `K` negatives."""

import torch
from torch import Tensor


def select_hard_negatives(
    scores: Tensor,
    positive_scores: Tensor,
    excluded: Tensor,
    num_negatives: int,
    false_negative_threshold: float | None = 0.95,
) -> tuple[Tensor, Tensor, Tensor]:
    """The most similar candidates of each query that are allowed and are likely to be true negatives.

    Candidate j of query i counts as a false negative if s_ij > p · s_i⁺, with s_i⁺ the score of the query's
    own pair.

    Args:
        scores: `(B, C)`, s, of the candidates, in falling order.
        positive_scores: `(B,)`, s⁺.
        excluded: `(B, C)` boolean, candidates that are not to be chosen, such as those of the query's clip.
        num_negatives: K in [1, C].
        false_negative_threshold: p in [0, 1], or `None` for no such filter.

    Returns:
        The columns of the chosen candidates `(B, K)`, hardest first; `(B, K)` boolean, false where a query
        has fewer than K (the column is then that of some other candidate); and `(B, C)` boolean, the
        candidates that were filtered as false negatives.

    References:
        The filter is the positive-aware mining of NV-Retriever, arXiv 2407.15831 (TopK-PercPos, with
        95% of the positive's score).

    Examples:
        >>> columns, chosen, filtered = select_hard_negatives(
        ...     torch.tensor([[0.8, 0.6, 0.5, 0.1]]),
        ...     torch.tensor([0.7]),
        ...     torch.tensor([[False, True, False, False]]),
        ...     num_negatives=2,
        ... )
        >>> columns.tolist(), chosen.tolist(), filtered.tolist()
        ([[2, 3]], [[True, True]], [[True, False, False, False]])
    """
    filtered = torch.zeros_like(excluded)
    if false_negative_threshold is not None:
        filtered = (scores > false_negative_threshold * positive_scores[:, None]) & ~excluded
    left_out = excluded | filtered  # (B, C)
    columns = left_out.int().argsort(dim=1, stable=True)[:, :num_negatives]  # (B, K)
    return columns, ~left_out.gather(1, columns), filtered


def repeated(ids: Tensor) -> Tensor:
    """Where a row names an id again.

    Args:
        ids: `(B, C)`.

    Returns:
        `(B, C)` boolean, true where an earlier column of the same row has the same id.

    Examples:
        >>> repeated(torch.tensor([[5, 3, 5, 5]]))
        tensor([[False, False,  True,  True]])
    """
    values, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(values, dtype=torch.bool)
    again[:, 1:] = values[:, 1:] == values[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)
