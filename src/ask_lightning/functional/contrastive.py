"""NT-Xent over a similarity matrix, Eq. 16, and its targets. Axes: `B` batch, `C` candidates."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(
    similarity: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    targets: Tensor | None = None,
    ignore: Tensor | None = None,
    decoupled: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy over the rows of a similarity matrix whose diagonal holds the pairs.

    One direction of the contrastive loss. With rows text and columns audio it is text-to-audio; the
    usual symmetric loss is `(nt_xent(S) + nt_xent(S.T)) / 2`.

    Args:
        similarity: `(B, C)`, similarity of query i (row) and candidate j (column). C is B, or more: the
            columns behind the first B are further negatives.
        temperature: τ > 0, a number or a 0-d tensor (learnable if it requires a gradient).
        targets: `(B, C)`, a probability for each candidate of a row, rows of sum 1. Default: the diagonal.
        ignore: `(B, C)` boolean; true entries are left out of the denominator, such as other captions of
            the same clip. The diagonal is never left out.
        decoupled: Whether the targets leave the denominator, which then holds the negatives alone (DCL,
            Yeh et al., arXiv 2110.06848, Eq. 5). A row without negatives counts as 0.
        reduction: `"mean"` over the batch, or `"none"` for one value for each row.

    Returns:
        0-d, or `(B,)` with `reduction="none"`.

    Examples:
        >>> nt_xent(torch.zeros(4, 4))  # log 4
        tensor(1.3863)
    """
    logits = similarity / temperature
    if ignore is not None:
        ignore = ignore & ~torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
        logits = logits.masked_fill(ignore, -torch.inf)
    if decoupled:
        losses = _decoupled(logits, targets)
        return losses.mean() if reduction == "mean" else losses
    if targets is None:
        pairs = torch.arange(len(similarity), device=similarity.device)
        return F.cross_entropy(logits, pairs, reduction=reduction)
    log_probabilities = logits.log_softmax(dim=1)
    if ignore is not None:
        # What is ignored is nobody's target, and 0 times minus infinity would be no number.
        log_probabilities = log_probabilities.masked_fill(targets == 0, 0)
    losses = (targets * log_probabilities).sum(dim=1).neg()  # (B,)
    return losses.mean() if reduction == "mean" else losses


def _decoupled(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Cross-entropy `(B,)` of rows whose targets are left out of the denominator."""
    if targets is None:
        targets = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
    attraction = (targets * logits.masked_fill(targets == 0, 0)).sum(dim=1)  # (B,)
    negatives = logits.masked_fill(targets > 0, -torch.inf)  # (B, B)
    return without_empty_rows(negatives, lambda rows: rows.logsumexp(dim=1) - attraction)


def without_empty_rows(negatives: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """A loss of rows of negatives, with 0 and no gradient for rows that have none.

    Args:
        negatives: `(B, B)`, logits; minus infinity where a candidate is no negative.
        loss: Function from such logits to one value for each row, `(B,)`.

    Returns:
        `(B,)`.

    Examples:
        >>> rows = torch.tensor([[-torch.inf, 2.0], [-torch.inf, -torch.inf]])
        >>> without_empty_rows(rows, lambda rows: rows.logsumexp(dim=1))
        tensor([2., 0.])
    """
    empty = (negatives == -torch.inf).all(dim=1)  # (B,)
    # The gradient of an empty logsumexp is no number, also where it is multiplied by 0.
    return loss(negatives.masked_fill(empty[:, None], 0)).masked_fill(empty, 0)


def pair_targets(
    positives: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Targets that are uniform over the positives of each row, mixed with uniform ones over the batch.

    With P_i the positives of row i and C_i its candidates, ε the label smoothing:

        Y_ij = (1 - ε) [j ∈ P_i] / |P_i| + ε [j ∈ C_i] / |C_i|

    Args:
        positives: `(B, B)` boolean, true for the positives of each row; the diagonal is always one of them.
        label_smoothing: ε in [0, 1].
        ignore: `(B, B)` boolean, candidates that are nobody's target. The diagonal is never ignored.
        dtype: The dtype of the targets.

    Returns:
        `(B, B)`, rows of sum 1.

    References:
        Cross-entropy against targets that are uniform over several positives is the loss L_out of SupCon
        (Khosla et al., arXiv 2004.11362, Eq. 2), between modalities. Label smoothing is that of
        `torch.nn.functional.cross_entropy`.

    Examples:
        >>> pair_targets(torch.eye(2, dtype=torch.bool), label_smoothing=0.2)
        tensor([[0.9000, 0.1000],
                [0.1000, 0.9000]])
    """
    own = torch.eye(len(positives), dtype=torch.bool, device=positives.device)
    positives = positives | own
    candidates = torch.ones_like(positives) if ignore is None else ~ignore | own
    sharp, flat = (
        allowed.to(dtype) / allowed.sum(dim=1, keepdim=True)
        for allowed in (positives & candidates, candidates)
    )
    return (1 - label_smoothing) * sharp + label_smoothing * flat
