"""`torch.compile` of a loss: the same values and gradients, of one graph."""

import shutil

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from ask_lightning import (
    ASKModule,
    KnowledgeBase,
    KnowledgeDistillationLoss,
    NTXentLoss,
    ReliabilityOTLoss,
)
from ask_lightning.losses import HardNegativeMiningLoss
from tests.helpers.clients import MemoryLogger, Pairs, PlainTowers, make_refresh, make_trainer
from tests.helpers.loss_cases import make_case
from tests.helpers.operators import IS_OLD_TORCH
from tests.helpers.vectors import directions, needs_gpu

LOSSES = {
    "ask": lambda: ReliabilityOTLoss(num_neighbors=3),
    "ask with all that ids allow": lambda: ReliabilityOTLoss(
        num_neighbors=3, exclude_self=True, distinct_clips=True, positives="ids", distillation_weight=0.3
    ),
    "ask through the plan": lambda: ReliabilityOTLoss(
        num_neighbors=3, detach_plan=False, sinkhorn_iterations=3
    ),
    "teacher": KnowledgeDistillationLoss,
    "transport teacher": lambda: KnowledgeDistillationLoss(teacher="transport", positives="ids"),
    "mined negatives": lambda: HardNegativeMiningLoss(num_negatives=2, num_candidates=5),
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


def fit(loss, **options):
    """The logged rows of a run of three refreshes, with batches of two sizes."""
    pl.seed_everything(0, verbose=False)
    module, logger = ASKModule(PlainTowers(), loss, step="encode", ids="clip_id"), MemoryLogger()
    refresh = make_refresh(1, index="exact")
    run = make_trainer(logger=logger, log_every_n_steps=1, callbacks=[refresh], max_epochs=4, **options)
    run.fit(module, DataLoader(Pairs(20), 8))
    return logger.rows


def assert_same_rows(rows, expected):
    assert [step for step, _ in rows] == [step for step, _ in expected]
    for (_, row), (_, wanted) in zip(rows, expected, strict=True):
        times = {name for name in wanted if "second" in name or "share" in name}
        assert {name: row[name] for name in wanted if name not in times} == pytest.approx(
            {name: wanted[name] for name in wanted if name not in times}, rel=1e-3, abs=1e-5
        )


@pytest.mark.skipif(IS_OLD_TORCH, reason="older torch cannot trace all of Python that the losses use")
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_one_graph_for_the_whole_run(name):
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    loss = LOSSES[name]()
    loss.compile(backend=compiler, fullgraph=True)
    rows = fit(loss)
    assert len(graphs) == 2, "one for the first size, one for all others, and none for new knowledge"
    assert_same_rows(rows, fit(LOSSES[name]()))


def test_compiled_loss_refuses_a_factor_that_is_not_positive():
    torch._dynamo.reset()
    audio = 3 * directions(40, 8)
    base = KnowledgeBase.from_embeddings(audio, audio, num_prototypes=4, index="exact")
    for pairs in (base.fine, base.coarse):
        vars(pairs)["is_bounded"] = False
        pairs.audio.mul_(3), pairs.text.mul_(3)
    loss = ReliabilityOTLoss(num_neighbors=1, lambda_fine=0.6, lambda_coarse=0.3)
    loss.compile(backend="eager")
    with pytest.raises(ValueError, match="modulation factor of direction"):
        loss(audio[:4], audio[:4], knowledge=base)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_recorded_as_graphs_of_a_gpu_trains_like_the_plain_one(name, device):
    torch._dynamo.reset()
    loss = LOSSES[name]()
    loss.compile(mode="reduce-overhead")
    on_gpu = {"accelerator": "gpu"}
    assert_same_rows(fit(loss, **on_gpu), fit(LOSSES[name](), **on_gpu))
