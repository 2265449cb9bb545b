"""The representation drift measure RDM, Eq. 4. Axes: `Q` queries, `N` pairs, `d` width."""

import torch
from torch import Tensor


def representation_drift(
    queries: Tensor, current: Tensor, stored: Tensor, *, block_size: int = 1024
) -> Tensor:
    """How far retrieval from a stored knowledge base departs from retrieval from a fresh one.

    Eq. 4 of the paper, for one modality, without a temperature, in float32 whatever autocast is active:

        RDM = mean_i KL( softmax_j(u_i · U_j^now) ‖ softmax_j(u_i · U_j^stored) )

    It is 0 right after a refresh (Eq. 14), and bounds the deviation of the softmax-weighted knowledge
    `K(u) = Σ_j softmax_j(u · U_j) U_j`'s weights by Pinsker's inequality (Eq. 6).

    Args:
        queries: `(Q, d)`, embeddings by the current encoder.
        current: `(N, d)`, the knowledge encoded by the current encoder.
        stored: `(N, d)`, the same rows as they are stored.
        block_size: Queries that are scored at a time; bounds memory to two `(block_size, N)` matrices.

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
    with torch.autocast(queries.device.type, enabled=False):
        # A drift of 1e-4 is a difference of logarithms, of which half precision leaves only noise.
        dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
        queries, current, stored = (rows.to(dtype) for rows in (queries, current, stored))
        total = queries.new_zeros(())
        for block in queries.split(block_size):
            now = torch.log_softmax(block @ current.T, dim=1)  # (block, N)
            before = torch.log_softmax(block @ stored.T, dim=1)  # (block, N)
            total = total + (now.exp() * (now - before)).sum()
        return total / len(queries)
