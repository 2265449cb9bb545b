"""Checksums of tensors that can be computed over the shards of a tensor and then added up."""

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS_AT_ONCE = 1 << 14
# Odd constants of the SplitMix64 generator, as signed numbers; integer arithmetic wraps around.
_FIRST, _SECOND, _STEP = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


def checksum(rows: Tensor, numbers: Tensor | None = None) -> int:
    """Sum a hash of every row and its number, modulo 2^64.

    The checksums of the shards of a tensor add up to that of the whole tensor. The computation runs on the
    tensor's device. It detects damage and differences, but is no protection against tampering.

    Args:
        rows: `(n, ...)`, any dtype.
        numbers: `(n,)` int64, the numbers of the rows in the whole tensor; default: 0 … n - 1.

    Returns:
        An integer in [0, 2^64).

    Examples:
        >>> whole = torch.arange(6.0).view(3, 2)
        >>> one, other = torch.tensor([0, 2]), torch.tensor([1])
        >>> parts = checksum(whole[one], one) + checksum(whole[other], other)
        >>> parts % 2**64 == checksum(whole), checksum(whole) == checksum(whole.flip(0))
        (True, False)
    """
    flat = torch.atleast_1d(rows.detach())
    flat = flat.unsqueeze(1) if flat.ndim == 1 else flat.flatten(1)  # (n, d)
    if numbers is None:
        numbers = torch.arange(len(flat), device=rows.device)
    bits = flat.contiguous().view(_BITS[flat.element_size()])  # (n, d)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1
    weights = weights.to(rows.device)  # (d,), odd
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for block, number in zip(
        bits.split(_ROWS_AT_ONCE), numbers.to(rows.device).split(_ROWS_AT_ONCE), strict=True
    ):
        hashed = (block.long() * weights).sum(dim=1) + (number + 1) * _STEP  # (block,)
        hashed = (hashed ^ (hashed >> 30)) * _FIRST
        hashed = (hashed ^ (hashed >> 27)) * _SECOND
        total += (hashed ^ (hashed >> 31)).sum()
    return int(total) % 2**64
