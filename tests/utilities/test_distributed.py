"""Collective operations of real processes."""

import torch
from torch import Tensor

from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks


def broadcast_views() -> list[Tensor]:
    """Some memory of which a view with strides is broadcast, and a tensor with its axes in another order."""
    ranks = Ranks.current()
    memory, turned = torch.arange(12.0) + 100 * ranks.rank, torch.arange(6.0) + 100 * ranks.rank
    ranks.broadcast(memory.view(3, 4)[:, ::2])
    ranks.broadcast(turned.view(2, 3).T)
    return [memory, turned]


def test_a_broadcast_tensor_may_have_strides():
    first, second = on_ranks(2, broadcast_views)
    whole = torch.arange(12.0)
    assert torch.equal(first[0], whole)
    assert torch.equal(second[0], torch.where(whole % 2 == 0, whole, whole + 100))
    for _, turned in (first, second):
        assert torch.equal(turned, torch.arange(6.0))


def fail_on_one() -> str:
    ranks = Ranks.current()
    try:
        with ranks.all_or_none("reading"):
            if ranks.rank == 1:
                raise KeyError("clip 7")
    except KeyError as error:
        return f"own {error}"
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_ranks_fail_together():
    first, second = on_ranks(2, fail_on_one)
    assert first == "Rank 1 failed while reading. KeyError: 'clip 7'"
    assert second == "own 'clip 7'"
