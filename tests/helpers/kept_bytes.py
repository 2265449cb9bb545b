"""How much memory autograd holds for backward passes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KeptBytes:
    """Bytes of tensors that graphs hold, without leaves and views of leaves; each storage counts once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._holders: Counter[int] = Counter()

    def hold(self, tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not self._holders[address]:
            self.now += size
            self.most = max(self.most, self.now)
        self._holders[address] += 1
        return _Held(tensor, self, address, size)

    def release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            self.now -= size


class _Held:
    def __init__(self, tensor: Tensor, owner: KeptBytes, address: int, size: int) -> None:
        self.tensor, self._owner, self._of = tensor, owner, (address, size)

    def __del__(self) -> None:
        self._owner.release(*self._of)


@contextmanager
def kept_bytes() -> Iterator[KeptBytes]:
    """Count while the block runs."""
    count = KeptBytes()

    def pack(tensor: Tensor) -> "Tensor | _Held":
        base = tensor if tensor._base is None else tensor._base
        return tensor if base.is_leaf else count.hold(tensor)

    def unpack(held: "Tensor | _Held") -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield count
