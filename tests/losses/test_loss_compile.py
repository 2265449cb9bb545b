"""`torch.compile` of a loss: the same values and gradients."""

import shutil

import pytest
import torch

from ask_lightning import KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss
from tests.helpers.loss_cases import make_case

LOSSES = {
    "ask": lambda: ReliabilityOTLoss(num_neighbors=3),
    "ask through the plan": lambda: ReliabilityOTLoss(
        num_neighbors=3, detach_plan=False, sinkhorn_iterations=3
    ),
    "teacher": KnowledgeDistillationLoss,
    "nt-xent": NTXentLoss,
}
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
            ),
        ],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_loss_is_the_same(name, backend):
    case, values, gradients = make_case(dtype=torch.float32), [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        loss = LOSSES[name]()
        step = torch.compile(loss, backend=backend, dynamic=False) if compiled else loss
        sides = [side.clone().requires_grad_() for side in (case.audio, case.text)]
        value = step(*sides, ids=case.ids, knowledge=case.base)
        gradients.append(torch.autograd.grad(value, sides))
        values.append(value.detach())
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
