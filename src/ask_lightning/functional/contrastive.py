"""NT-Xent over a similarity matrix, Eq. 16. Axes: `B` batch, `C` candidates."""

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
    if targets is None:
        pairs = torch.arange(len(similarity), device=similarity.device)
        return F.cross_entropy(logits, pairs, reduction=reduction)
    # What is ignored is nobody's target, and 0 times minus infinity would be no number.
    log_probabilities = logits.log_softmax(dim=1).masked_fill(targets == 0, 0)
    losses = -(targets * log_probabilities).sum(dim=1)  # (B,)
    return losses.mean() if reduction == "mean" else losses
