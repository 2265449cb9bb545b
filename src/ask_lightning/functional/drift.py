"""The representation drift measure RDM, Eq. 4, and how far single rows move.

Axes: `Q` queries, `N` pairs, `d` width.
"""

import torch
from torch import Tensor

from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.dtypes import computation_dtype


def representation_drift(
    queries: Tensor, current: Tensor, stored: Tensor, *, block_size: int = 1024
) -> Tensor:
    """How far retrieval from a stored knowledge base departs from retrieval from a fresh one.

    Eq. 4 of the paper, for one modality, without a temperature, in float32 whatever autocast is active:

        RDM = mean_i KL( softmax_j(u_i · U_j^now) ‖ softmax_j(u_i · U_j^stored) )

    It is 0 right after a refresh (Eq. 14). By Pinsker's inequality (Eq. 6) it bounds how far the softmax
    weights of the knowledge `K(u) = Σ_j softmax_j(u · U_j) U_j` deviate.

    Args:
        queries: `(Q, d)`, embeddings by the current encoder.
        current: `(N, d)`, the knowledge encoded by the current encoder.
        stored: `(N, d)`, the same rows as they are stored.
        block_size: Number of queries that are scored at a time, at least 1; bounds memory to two
            `(block_size, N)` matrices.

    Returns:
        0-d, at least 0 up to rounding.

    Raises:
        ValueError: `current` and `stored` differ in shape, or there is no query.

    Examples:
        >>> rows = torch.eye(3)
        >>> representation_drift(rows, rows, rows)
        tensor(0.)
    """
    if current.shape != stored.shape:
        raise ValueError(
            "Arguments `current` and `stored` have to hold the same rows, "
            f"but got shapes {tuple(current.shape)} and {tuple(stored.shape)}."
        )
    if len(queries) == 0:
        raise ValueError("Argument `queries` has to hold at least one embedding, but got none.")
    check_count("block_size", block_size)
    with torch.autocast(queries.device.type, enabled=False):
        # A drift of 1e-4 is a difference of logarithms, of which half precision leaves only noise.
        dtype = computation_dtype(queries)
        queries, current, stored = (rows.to(dtype) for rows in (queries, current, stored))
        total = queries.new_zeros(())
        for block in queries.split(block_size):
            now, before = block @ current.T, block @ stored.T  # (block, N)
            total = total + softmax_divergence(now, before, log_normalizers(now, before)).sum()
        return total / len(queries)


def mean_displacement(current: Tensor, stored: Tensor) -> Tensor:
    """Mean cosine distance of rows from where they are stored: mean_i (1 - u_i · u_i^stored).

    Args:
        current: `(N, d)`, unit vectors by the current encoder.
        stored: `(N, d)`, the same rows as they are stored, unit vectors.

    Returns:
        0-d, in [0, 2].

    Examples:
        >>> mean_displacement(torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
        tensor(0.2000)
    """
    return 1 - (current * stored).sum(dim=1).mean()


def mean_spread(rows: Tensor) -> Tensor:
    """Mean cosine distance between two different rows, the unit in which a displacement is large or small.

    Args:
        rows: `(N, d)`, unit vectors; N ≥ 2.

    Returns:
        0-d, in [0, 2]: 1 for rows in all directions alike, 0 for rows that are all equal.

    Examples:
        >>> mean_spread(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        tensor(0.6667)
    """
    # The sum of all u_i · u_j is the squared length of the sum; N of them are those of a row with itself.
    count = len(rows)
    return 1 - (rows.sum(dim=0).square().sum() - rows.square().sum()) / (count * (count - 1))


def log_normalizers(current: Tensor, stored: Tensor) -> Tensor:
    """Logarithms of the two softmax denominators of each query.

    Args:
        current: `(Q, N)`, scores of the current rows.
        stored: `(Q, N)`, scores of the stored rows.

    Returns:
        `(Q, 2)`. Those of a table that is divided into blocks of rows are the `logsumexp` over the blocks.

    Examples:
        >>> log_normalizers(torch.zeros(1, 4), torch.zeros(1, 4))  # log 4
        tensor([[1.3863, 1.3863]])
    """
    return torch.stack([current.logsumexp(dim=1), stored.logsumexp(dim=1)], dim=1)


def softmax_divergence(current: Tensor, stored: Tensor, normalizers: Tensor) -> Tensor:
    """`KL(softmax(current) ‖ softmax(stored))` of each query.

    Args:
        current: `(Q, N)`, scores of the current rows.
        stored: `(Q, N)`, scores of the stored rows.
        normalizers: `(Q, 2)`, the result of `log_normalizers` for all rows.

    Returns:
        `(Q,)`. The shares of blocks of rows, each computed with the normalizers of all rows, add up to the
        divergence of the whole table.

    Examples:
        >>> now, before = torch.eye(2), torch.zeros(2, 2)
        >>> softmax_divergence(now, before, log_normalizers(now, before))
        tensor([0.1109, 0.1109])
    """
    log_current = current - normalizers[:, :1]  # (Q, N)
    log_stored = stored - normalizers[:, 1:]  # (Q, N)
    return (log_current.exp() * (log_current - log_stored)).sum(dim=1)
