"""Which operators of torch a task calls, and tensors of a GPU on a machine without one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.knowledge.pairs import StoredPairs
from ask_lightning.knowledge.stored_clips import StoredClips
from ask_lightning.utilities.distributed import Ranks

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
# The versions before the one whose operators are counted.
IS_OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        alias = [returned.alias_info for returned in operator._schema.returns]
        # Views, and what asks for a property of a tensor, cost neither a kernel nor a reading of memory.
        is_view = any(info is not None and not info.is_write for info in alias)
        if operator.namespace in ("aten", "ask_lightning") and not is_view:
            self.calls[str(operator.overloadpacket).removeprefix("aten.").removeprefix("ask_lightning.")] += 1
        return operator(*args, **(kwargs or {}))


def count_operators(task: Callable[[], object]) -> Counter[str]:
    """Calls of each operator that is no view, in the task and in the backward passes that it starts."""
    with _Counting() as counting:
        task()
    return counting.calls


def assert_no_more_than(counted: Mapping[str, int], stored: Mapping[str, int]) -> None:
    """Refuse more calls than were stored, naming the operators that have become more."""
    total, expected = sum(counted.values()), sum(stored.values())
    more = {name: f"{stored.get(name, 0)} → {n}" for name, n in counted.items() if n > stored.get(name, 0)}
    assert total <= expected, (
        f"{total} operator calls instead of {expected}; more of {more}. If that is meant, store "
        f"{dict(sorted(counted.items()))}."
    )


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors of a GPU have shapes but no numbers: whatever has to know a number on the host is an error."""
    if IS_OLD_TORCH:
        pytest.skip("this torch ends the process where a fake tensor meets a GPU that is not there")
    with FakeTensorMode():
        yield


def base_on(device: str, pairs: int = 100, prototypes: int = 10, width: int = 8) -> KnowledgeBase:
    """A base of equal rows, with what the host knows of it already computed."""

    def rows(count: int) -> StoredPairs:
        made = StoredPairs(*torch.full((2, count, width), width**-0.5, device=device), "exact")
        vars(made)["is_bounded"] = True
        return made

    base = KnowledgeBase(rows(pairs), rows(prototypes), torch.arange(pairs, device=device) // 2)
    sums = torch.full((pairs // 2, 2 * width), width**-0.5, device=device)
    clips = StoredClips(torch.arange(pairs // 2, device=device), sums, Ranks())
    vars(base).update(_rows_per_id=2, _num_ids=pairs // 2, _clips=clips)
    return base
