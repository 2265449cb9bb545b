"""How many operators a step calls: a change that makes it slower shows here, whatever the machine does."""

import pytest
import torch

from ask_lightning import KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss
from ask_lightning.functional import sinkhorn_plan
from tests.helpers.operators import (
    IS_OLD_TORCH,
    assert_no_more_than,
    base_on,
    count_operators,
    fake_gpu,
    needs_triton,
)
from tests.helpers.vectors import directions

pytestmark = [
    pytest.mark.skipif(IS_OLD_TORCH, reason="the numbers are those of torch 2.12"),
    needs_triton,
]

STORED: dict[str, dict[str, int]] = {
    "ask, step": {
        "_local_scalar_dense": 4,
        "_log_softmax": 4,
        "_log_softmax_backward_data": 4,
        "_softmax": 4,
        "abs": 2,
        "add": 38,
        "addmm": 4,
        "amax": 1,
        "any": 4,
        "arange": 8,
        "bitwise_or": 2,
        "bmm": 8,
        "clamp_min": 1,
        "clone": 4,
        "div": 20,
        "div_": 1,
        "eq": 12,
        "exp": 4,
        "gather": 8,
        "gt": 4,
        "index": 4,
        "le": 2,
        "linalg_vector_norm": 2,
        "log": 2,
        "masked_fill": 4,
        "masked_fill_": 2,
        "mean": 7,
        "mm": 14,
        "mul": 50,
        "mul_": 4,
        "neg": 5,
        "nll_loss_backward": 4,
        "nll_loss_forward": 4,
        "ones_like": 1,
        "scalar_tensor": 4,
        "sort": 8,
        "stack": 9,
        "sub": 2,
        "sum": 7,
        "topk": 8,
        "where": 8,
    },
    "ask, forward on a GPU": {
        "_log_softmax": 4,
        "_softmax": 4,
        "abs": 2,
        "add": 23,
        "addmm": 4,
        "arange": 8,
        "bitwise_or": 2,
        "bmm": 4,
        "clamp_min": 1,
        "clone": 4,
        "div": 7,
        "eq": 6,
        "exp": 4,
        "exponential_plan": 1,
        "gather": 8,
        "gt": 4,
        "index": 4,
        "le": 2,
        "linalg_vector_norm": 2,
        "log": 2,
        "masked_fill": 2,
        "mean": 7,
        "mm": 6,
        "mul": 21,
        "neg": 2,
        "nll_loss_forward": 4,
        "scalar_tensor": 4,
        "sort": 8,
        "stack": 8,
        "sub": 2,
        "sum": 5,
        "topk": 8,
        "where": 8,
    },
    "teacher, step": {
        "_log_softmax": 4,
        "_log_softmax_backward_data": 2,
        "_softmax": 2,
        "_to_copy": 1,
        "abs": 4,
        "add": 5,
        "add_": 2,
        "arange": 2,
        "bitwise_and": 1,
        "bitwise_not": 2,
        "bitwise_or": 4,
        "clamp": 1,
        "clamp_min": 1,
        "div": 21,
        "eq": 7,
        "fill_": 1,
        "index": 2,
        "le": 4,
        "linalg_vector_norm": 4,
        "log": 1,
        "masked_fill": 7,
        "masked_fill_": 2,
        "mean": 4,
        "mm": 4,
        "mul": 15,
        "neg": 7,
        "nll_loss_forward": 2,
        "ones_like": 1,
        "rsub": 1,
        "searchsorted": 1,
        "stack": 1,
        "sub": 4,
        "sum": 6,
    },
    "teacher, forward on a GPU": {
        "_log_softmax": 4,
        "_softmax": 2,
        "_to_copy": 1,
        "abs": 4,
        "add": 2,
        "add_": 2,
        "arange": 2,
        "bitwise_and": 1,
        "bitwise_not": 2,
        "bitwise_or": 4,
        "clamp": 1,
        "clamp_min": 1,
        "div": 9,
        "eq": 5,
        "fill_": 1,
        "index": 2,
        "le": 4,
        "linalg_vector_norm": 4,
        "log": 1,
        "masked_fill": 5,
        "mean": 4,
        "mm": 2,
        "mul": 8,
        "neg": 3,
        "nll_loss_forward": 2,
        "rsub": 1,
        "searchsorted": 1,
        "stack": 1,
        "sub": 4,
        "sum": 4,
    },
    "nt-xent, step": {
        "_log_softmax": 2,
        "_log_softmax_backward_data": 2,
        "abs": 2,
        "add": 4,
        "arange": 2,
        "bitwise_or": 2,
        "div": 14,
        "eq": 4,
        "le": 2,
        "linalg_vector_norm": 2,
        "masked_fill": 4,
        "masked_fill_": 2,
        "mm": 3,
        "mul": 6,
        "neg": 2,
        "nll_loss_backward": 2,
        "nll_loss_forward": 2,
        "ones_like": 1,
        "sub": 2,
        "sum": 2,
    },
    "nt-xent, forward on a GPU": {
        "_log_softmax": 2,
        "abs": 2,
        "add": 1,
        "arange": 2,
        "bitwise_or": 2,
        "div": 4,
        "eq": 2,
        "le": 2,
        "linalg_vector_norm": 2,
        "masked_fill": 2,
        "mm": 1,
        "mul": 1,
        "nll_loss_forward": 2,
        "sub": 2,
    },
    "search, cpu": {
        "_local_scalar_dense": 2,
        "add": 4,
        "any": 2,
        "arange": 2,
        "clone": 2,
        "eq": 4,
        "gather": 4,
        "gt": 2,
        "index": 2,
        "mm": 2,
        "scalar_tensor": 2,
        "sort": 4,
        "stack": 1,
        "topk": 4,
        "where": 4,
    },
    "search, cuda": {
        "add": 4,
        "arange": 2,
        "clone": 2,
        "eq": 2,
        "gather": 4,
        "gt": 2,
        "index": 2,
        "mm": 2,
        "scalar_tensor": 2,
        "sort": 4,
        "stack": 1,
        "topk": 4,
        "where": 4,
    },
    "transport, cpu, 8": {"add": 1, "amax": 1, "div_": 1, "mul_": 4},
    "transport, cuda, 32": {"exponential_plan": 1},
    "transport, cuda, 2048": {
        "add": 1,
        "amax": 1,
        "bmm": 100,
        "div": 1,
        "div_": 1,
        "exp_": 1,
        "mul_": 52,
        "new_empty": 1,
        "new_ones": 1,
        "reciprocal_": 100,
    },
}
MAKE = {
    "ask": lambda: ReliabilityOTLoss(num_neighbors=3),
    "teacher": KnowledgeDistillationLoss,
    "nt-xent": NTXentLoss,
}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    audio, text = (directions(6, 8, seed).requires_grad_() for seed in (0, 1))
    return audio, text, torch.arange(6)


@pytest.mark.parametrize("name", MAKE)
def test_step(name):
    loss = MAKE[name]()
    loss.knowledge = base_on("cpu")
    audio, text, ids = batch()
    counted = count_operators(lambda: loss(audio, text, ids=ids).backward())
    assert_no_more_than(counted, STORED[f"{name}, step"])


@pytest.mark.parametrize("name", MAKE)
def test_forward_pass_on_a_gpu(name):
    loss = MAKE[name]()
    with fake_gpu():
        loss.knowledge = base_on("cuda")
        audio, text = (torch.empty(6, 8, device="cuda", requires_grad=True) for _ in range(2))
        ids = torch.arange(6, device="cuda")
        counted = count_operators(lambda: loss(audio, text, ids=ids))
    assert_no_more_than(counted, STORED[f"{name}, forward on a GPU"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_search(device):
    with fake_gpu() if device == "cuda" else torch.no_grad():
        base = base_on(device)
        audio, text = torch.empty(2, 6, 8, device=device)
        counted = count_operators(lambda: base.lookup(audio, text, 3, granularities=("fine",)))
    assert_no_more_than(counted, STORED[f"search, {device}"])


@pytest.mark.parametrize(("device", "rows"), [("cpu", 8), ("cuda", 32), ("cuda", 2048)])
def test_transport(device, rows):
    with fake_gpu() if device == "cuda" else torch.no_grad():
        similarity = torch.zeros(2, rows, rows, device=device)
        counted = count_operators(lambda: sinkhorn_plan(similarity))
    assert_no_more_than(counted, STORED[f"transport, {device}, {rows}"])


def test_more_calls_are_named():
    with pytest.raises(AssertionError, match=r"8 operator calls instead of 6; more of \{'mul': '2 → 4'\}"):
        assert_no_more_than({"mul": 4, "add": 4}, {"mul": 2, "add": 4})
