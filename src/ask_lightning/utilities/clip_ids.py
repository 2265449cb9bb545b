"""Ids of clips and captions as integers that every process agrees on."""

from collections.abc import Mapping, Sequence, Set
from hashlib import blake2b
from operator import index

import torch
from torch import Tensor


def integer_ids(ids: Tensor | Sequence[int | str], *, name: str = "ids") -> Tensor:
    """Turn ids into a tensor of 64-bit integers.

    Strings are hashed with BLAKE2b, which unlike `hash` gives the same number in every process and run.
    Among a million different strings two collide with a probability below 1e-7. Integers stay what they
    are, so `7` and `"7"` are different ids.

    Args:
        ids: `(B,)` integer tensor, or a sequence of integers or strings.
        name: What to call the argument in an error.

    Returns:
        `(B,)` int64; a tensor stays on its device.

    Raises:
        ValueError: If a tensor is not a vector of integers, the ids have no order, or an id is neither an
            integer of 64 bits nor a string.

    Examples:
        >>> integer_ids([3, 1, 3])
        tensor([3, 1, 3])
        >>> dog, rain, again = integer_ids(["dog.wav", "rain.wav", "dog.wav"]).tolist()
        >>> dog == again, dog == rain
        (True, False)
    """
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"Argument `{name}` has to be a vector of integers but got {ids.dtype} of shape "
                f"{tuple(ids.shape)}. Pass one id a row."
            )
        if ids.dtype == torch.uint64:  # a cast would make negative numbers of those from 2⁶³ on
            ids = torch.tensor([_integer_id(item, name) for item in ids.tolist()], device=ids.device)
        return ids.detach().long()
    if isinstance(ids, str | bytes):
        raise ValueError(f"Argument `{name}` has to be a sequence of ids but got the one string {ids!r}.")
    if isinstance(ids, Set | Mapping):
        raise ValueError(
            f"Argument `{name}` has to be a sequence of ids in the order of the rows but got a "
            f"{type(ids).__name__}. Pass a list."
        )
    return torch.tensor([_integer_id(item, name) for item in ids], dtype=torch.int64)


def _integer_id(item: int | str, name: str) -> int:
    """One id as a 64-bit integer: integers as they are, strings hashed."""
    if isinstance(item, str):
        # A file name whose bytes are no Unicode has surrogates in their place.
        encoded = item.encode(errors="surrogatepass")
        return int.from_bytes(blake2b(encoded, digest_size=8).digest(), "big", signed=True)
    try:
        number = index(item)  # any integer type, NumPy's among them
    except TypeError:
        raise ValueError(
            f"Argument `{name}` has to hold integers or strings but got {item!r}. Pass `str(id)` for others."
        ) from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(
            f"Argument `{name}` has to hold integers of 64 bits but got {number}. Pass `str(id)` for others."
        )
    return number
