"""A loss never waits for the GPU: no number of a tensor is read by the host, forwards and backwards."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from ask_lightning import KnowledgeBase, KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss
from ask_lightning.functional import sinkhorn_plan
from tests.helpers.operators import base_on, fake_gpu
from tests.helpers.vectors import directions, needs_gpu

LOSSES = {
    "ask": lambda: ReliabilityOTLoss(num_neighbors=3),
    "ask with all that ids allow": lambda: ReliabilityOTLoss(
        num_neighbors=3, exclude_self=True, distinct_clips=True, positives="ids", distillation_weight=0.3
    ),
    "ask per sample": lambda: ReliabilityOTLoss(num_neighbors=3, modulation="sample", plan_scaling="row"),
    "ask through the plan": lambda: ReliabilityOTLoss(num_neighbors=3, detach_plan=False),
    "softmax teacher": lambda: KnowledgeDistillationLoss(),
    "transport teacher": lambda: KnowledgeDistillationLoss(teacher="transport", positives="ids"),
    "nt-xent": lambda: NTXentLoss(positives="same_clip"),
}


@contextmanager
def synchronisation_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LOSSES)
def test_forward_pass_reads_no_number(name):
    loss = LOSSES[name]()
    with fake_gpu():
        loss.knowledge = base_on("cuda")
        audio, text = (torch.empty(6, 8, device="cuda", requires_grad=True) for _ in range(2))
        assert loss(audio, text, ids=torch.arange(6, device="cuda")).device.type == "cuda"
        assert all(term.device.type == "cuda" for term in loss.last.values())


def test_reading_a_number_would_be_noticed():
    with fake_gpu(), pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        bool((torch.empty(3, device="cuda") > 0).any())


@pytest.mark.parametrize("rows", [32, 2048])  # below and above where the exponential domain takes over
def test_plan_reads_no_number(rows):
    with fake_gpu():
        assert sinkhorn_plan(torch.empty(2, rows, rows, device="cuda"), iterations=2).shape == (2, rows, rows)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("ids_on_host", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_step_does_not_wait_on_a_gpu(name, ids_on_host, device):
    loss = LOSSES[name]()
    pairs = [directions(100, 8, seed).to(device) for seed in (0, 1)]
    loss.knowledge = KnowledgeBase.from_embeddings(
        *pairs, ids=torch.arange(100) // 2, num_prototypes=10, index="exact"
    )
    audio, text = (directions(6, 8, seed).to(device).requires_grad_() for seed in (2, 3))
    ids = list(range(6)) if ids_on_host else torch.arange(6, device=device)
    expected = loss(audio, text, ids=ids)  # what is computed once for each base
    expected.backward()
    with synchronisation_is_an_error():
        again = loss(audio, text, ids=ids)
        again.backward()
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_factor_that_is_not_positive_is_refused_a_step_late_on_a_gpu(device):
    long = [3 * directions(40, 8, seed).to(device) for seed in (0, 0)]
    base = KnowledgeBase.from_embeddings(*long, num_prototypes=4, normalize_prototypes=False, index="exact")
    for pairs in (base.fine, base.coarse):
        vars(pairs)["is_bounded"] = False
        pairs.audio.mul_(3), pairs.text.mul_(3)
    loss = ReliabilityOTLoss(num_neighbors=1, lambda_fine=0.6, lambda_coarse=0.3)
    audio, text = (side[:4].clone().requires_grad_() for side in long)
    with synchronisation_is_an_error():
        loss(audio, text, knowledge=base)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="modulation factor of direction"):
        loss(audio, text, knowledge=base)
