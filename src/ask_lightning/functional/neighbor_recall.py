"""How many true nearest neighbours a search among approximate rows finds.

Axes: `Q` queries, `N` rows, `K` neighbours, `d` width.
"""

import torch
from torch import Tensor

from ask_lightning.utilities.arguments import check_count

_QUERIES_PER_BLOCK = 1024


@torch.no_grad()
def neighbor_recall(
    queries: Tensor, current: Tensor, stored: Tensor, k: int = 10, *, own_rows: Tensor | None = None
) -> Tensor:
    """Share of each query's K nearest rows among the current embeddings that it finds among stored ones.

    Args:
        queries: `(Q, d)`, embeddings by the current encoder.
        current: `(N, d)`, the rows by the current encoder.
        stored: `(N, d)`, the same rows as they are stored.
        k: K, number of neighbours, at least 1; all rows if there are fewer.
        own_rows: `(Q,)`, the row that each query is itself, which counts as no neighbour. None: queries are
            no rows.

    Returns:
        The mean over queries, 0-d, in [0, 1].

    Raises:
        ValueError: `k` is out of range, `current` and `stored` differ in shape, or there is no row to find.

    Examples:
        >>> rows = torch.eye(3)
        >>> neighbor_recall(rows, rows, rows.roll(1, dims=0), k=1)
        tensor(0.)
    """
    check_count("k", k, 1)
    if current.shape != stored.shape:
        raise ValueError(
            "Arguments `current` and `stored` have to hold the same rows, "
            f"but got shapes {tuple(current.shape)} and {tuple(stored.shape)}."
        )
    k = min(k, len(current) - (0 if own_rows is None else 1))
    if k < 1 or len(queries) == 0:
        raise ValueError(
            f"There have to be queries and rows to find, but got {len(queries)} queries and "
            f"{len(current)} rows."
        )
    found = 0
    for start in range(0, len(queries), _QUERIES_PER_BLOCK):
        block = slice(start, start + _QUERIES_PER_BLOCK)
        nearest = []
        for rows in (current, stored):
            scores = queries[block] @ rows.T  # (Q, N)
            if own_rows is not None:
                scores.scatter_(1, own_rows[block, None], -torch.inf)
            nearest.append(scores.topk(k, dim=1).indices)  # (Q, K)
        found += int((nearest[0][:, :, None] == nearest[1][:, None, :]).sum())
    return torch.tensor(found / (k * len(queries)), device=queries.device)
