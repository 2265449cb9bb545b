"""The plan as one kernel of a GPU, which Triton's interpreter runs without one."""

import os
import subprocess
import sys

import pytest
import torch

from ask_lightning.functional import sinkhorn_plan, transport
from tests.helpers.operators import IS_OLD_TORCH, count_operators, fake_gpu, needs_triton
from tests.helpers.vectors import directions, needs_gpu

SHAPES = [(1, 1), (2, 2), (5, 5), (7, 3), (3, 16), (2, 4, 4), (2, 1, 3, 5), (33, 32)]
INTERPRETED = f"""
import torch
from ask_lightning.functional import sinkhorn_plan
from ask_lightning.functional.transport_kernel import plan_in_one_kernel

for shape in {SHAPES}:
    similarity = 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(0)) - 1
    for given in (similarity, similarity.mT):
        for epsilon, iterations in ((0.1, 50), (0.03, 5), (1.0, 1)):
            plan = plan_in_one_kernel(given, epsilon, iterations)
            expected = sinkhorn_plan(given.double(), epsilon, iterations).float()
            torch.testing.assert_close(plan, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
similarity = torch.eye(3)
similarity[1, 2] = torch.nan
assert plan_in_one_kernel(similarity, 0.1, 3).isnan().all()
print("equal")
"""


@needs_triton
@pytest.mark.skipif(IS_OLD_TORCH, reason="the interpreter of older Triton does not go with new NumPy")
def test_interpreted_kernel_gives_the_plan_of_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "equal", run.stderr


@needs_triton
def test_small_problems_are_one_operator_and_large_ones_are_not():
    with fake_gpu():
        for shape in ((2, 32, 32), (1, 256, 256), (100, 3, 100)):
            plan = torch.empty(shape, device="cuda")
            assert count_operators(lambda plan=plan: sinkhorn_plan(plan)) == {"exponential_plan": 1}
        for large in (torch.empty(257, 257), torch.empty(32, 32, dtype=torch.float64)):
            plan = large.to("cuda")
            assert "exponential_plan" not in count_operators(lambda plan=plan: sinkhorn_plan(plan))


def test_without_triton_a_gpu_calls_operators_of_torch(monkeypatch):
    monkeypatch.setattr(transport, "_HAS_TRITON", False)
    with fake_gpu():
        plan = torch.empty(2, 32, 32, device="cuda")
        assert count_operators(lambda: sinkhorn_plan(plan))["_log_softmax"] == 100


def test_where_triton_cannot_build_kernels_operators_of_torch_make_the_plan(monkeypatch):
    class Broken:
        def plan_in_one_kernel(self, *args):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setitem(sys.modules, "ask_lightning.functional.transport_kernel", Broken())
    transport._builds_kernels.cache_clear()
    similarity = directions(6, 16) @ directions(5, 16, 1).T
    with pytest.warns(UserWarning, match="cannot build .* C compiler and Python's headers") as warned:
        plans = [transport._operator_on_gpu(similarity.T, 0.1, 50) for _ in range(2)]
    transport._builds_kernels.cache_clear()
    assert len(warned) == 1
    for plan in plans:
        assert plan.is_contiguous()
        torch.testing.assert_close(plan, sinkhorn_plan(similarity.T), rtol=1e-4, atol=1e-7)


def test_a_gpu_without_memory_is_no_sign_that_triton_cannot_build_kernels(monkeypatch):
    class Full:
        def plan_in_one_kernel(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    similarity = directions(6, 16) @ directions(5, 16, 1).T
    transport._builds_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "ask_lightning.functional.transport_kernel", Full())
    with pytest.raises(torch.OutOfMemoryError):
        transport._operator_on_gpu(similarity, 0.1, 50)

    class Working:
        def plan_in_one_kernel(self, similarity, epsilon, iterations):
            return sinkhorn_plan(similarity, epsilon, iterations)

    monkeypatch.setitem(sys.modules, "ask_lightning.functional.transport_kernel", Working())
    plan = transport._operator_on_gpu(similarity, 0.1, 50)
    transport._builds_kernels.cache_clear()
    assert torch.equal(plan, sinkhorn_plan(similarity, 0.1, 50))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_plan_of_a_gpu_that_is_not_the_current_one():
    similarity = directions(6, 16) @ directions(5, 16, 1).T
    plan = sinkhorn_plan(similarity.to("cuda:1")).cpu()
    torch.testing.assert_close(plan, sinkhorn_plan(similarity), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 128, 128), (256, 256), (64, 1000), (300, 300), (1024, 1024)])
def test_plan_of_a_gpu_is_that_of_a_cpu(shape, device):
    *_, rows, columns = shape
    for seed in range(3):
        text, audio = (directions(count, 16, seed + count) for count in (rows, columns))
        similarity = (text @ audio.T).expand(shape).clone()
        for epsilon in (0.1, 0.03, 0.01):
            expected = sinkhorn_plan(similarity.double(), epsilon).float()
            plan = sinkhorn_plan(similarity.to(device), epsilon).cpu()
            torch.testing.assert_close(plan, expected, rtol=1e-3, atol=2e-5 * float(expected.max()))
