"""The dtype of a computation on tensors that may be stored in half precision."""

import torch
from torch import Tensor


def computation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor is computed with.

    Args:
        tensor: Tensor of any floating dtype.

    Returns:
        float64 for a float64 tensor, otherwise float32.

    Examples:
        >>> computation_dtype(torch.ones(2, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
