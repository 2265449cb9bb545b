"""Reductions over tokens that leave padding out. A row without tokens gives 0 and gets no gradient."""

import torch
from torch import Tensor


def masked_max(scores: Tensor, mask: Tensor) -> Tensor:
    """The maximum over the last axis.

    Args:
        scores: Floating tensor `(..., L)`.
        mask: Boolean tensor that broadcasts to `scores`, false for padding.

    Returns:
        `(...)`; 0 where the mask is false throughout.

    Examples:
        >>> masked_max(torch.tensor([[-2.0, 5.0], [3.0, 4.0]]), torch.tensor([[True, False], [False, False]]))
        tensor([-2.,  0.])
    """
    return _without_padding(scores, mask).amax(dim=-1).masked_fill(~mask.any(dim=-1), 0)


def masked_sum(scores: Tensor, mask: Tensor) -> Tensor:
    """The sum over the last axis.

    Args:
        scores: Floating tensor `(..., L)`.
        mask: Boolean tensor that broadcasts to `scores`, false for padding.

    Returns:
        `(...)`; 0 where the mask is false throughout.

    Examples:
        >>> masked_sum(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
        tensor(1.)
    """
    return scores.masked_fill(~mask, 0).sum(dim=-1)


def masked_mean(scores: Tensor, mask: Tensor) -> Tensor:
    """The mean over the last axis.

    Args:
        scores: Floating tensor `(..., L)`.
        mask: Boolean tensor that broadcasts to `scores`, false for padding.

    Returns:
        `(...)`; 0 where the mask is false throughout.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    return masked_sum(scores, mask) / mask.sum(dim=-1).clamp_min(1)


def masked_logsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials over the last axis.

    Args:
        scores: Floating tensor `(..., L)`.
        mask: Boolean tensor that broadcasts to `scores`, false for padding.

    Returns:
        `(...)`; 0 where the mask is false throughout.

    Examples:
        >>> masked_logsumexp(torch.zeros(2, 3), torch.tensor([[True, True, False], [False, False, False]]))
        tensor([0.6931, 0.0000])
    """
    return _without_padding(scores, mask).logsumexp(dim=-1).masked_fill(~mask.any(dim=-1), 0)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax over the last axis.

    Args:
        scores: Floating tensor `(..., L)`.
        mask: Boolean tensor that broadcasts to `scores`, false for padding.

    Returns:
        `(..., L)`, 0 for padding.

    Examples:
        >>> masked_softmax(torch.zeros(2, 3), torch.tensor([[True, True, False], [False, False, False]]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    return _without_padding(scores, mask).softmax(dim=-1).masked_fill(~mask, 0)


def _without_padding(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores that padding is the smallest of; not -inf, whose softmax over padding alone is NaN."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
