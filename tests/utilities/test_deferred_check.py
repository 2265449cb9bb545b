"""`DeferredCheck`: at once on a CPU; a call late, without waiting, on a GPU."""

import copy
import pickle

import pytest
import torch

from ask_lightning.utilities.deferred_check import DeferredCheck
from tests.helpers.vectors import needs_gpu


def refuse_negative(value: float) -> None:
    if value < 0:
        raise ValueError(f"{value} is negative")


def test_cpu_checks_at_once():
    check = DeferredCheck()
    check(torch.tensor(1.0, requires_grad=True), refuse_negative)
    with pytest.raises(ValueError, match=r"-2.0 is negative"):
        check(torch.tensor(-2.0), refuse_negative)


class Arrival:
    """An event of a GPU that has happened when it is told."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened


def test_number_is_checked_when_it_has_arrived():
    check, arrival = DeferredCheck(), Arrival()
    check._underway = torch.tensor(-3.0), arrival, refuse_negative
    check.finish()
    check(torch.tensor(1.0), refuse_negative)
    arrival.happened = True
    with pytest.raises(ValueError, match=r"-3.0 is negative"):
        check(torch.tensor(1.0), refuse_negative)
    check.finish()  # which is told once


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda check: pickle.loads(pickle.dumps(check))])
def test_copies_have_nothing_underway(copied):
    check, arrival = DeferredCheck(), Arrival()
    arrival.happened = True
    check._underway = torch.tensor(-3.0), arrival, refuse_negative
    copied(check).finish()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_gpu_checks_a_call_late(device):
    check = DeferredCheck()
    check(torch.tensor(-2.0, device=device), refuse_negative)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"-2.0 is negative"):
        check(torch.tensor(1.0, device=device), refuse_negative)
