"""A fingerprint by which the weights of a model are known again."""

from hashlib import blake2b

import torch
from torch import nn


def weights_fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that two models share only if all their weights and buffers are the same.

    Args:
        model: A model on any device. What its `state_dict` leaves out, such as buffers that are not
            persistent, does not count.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_fingerprint(layer)
        >>> before == weights_fingerprint(layer)
        True
        >>> _ = nn.init.zeros_(layer.bias)
        >>> before == weights_fingerprint(layer)
        False
    """
    digest = blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
