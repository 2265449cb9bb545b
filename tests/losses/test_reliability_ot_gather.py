"""`ReliabilityOTLoss(gather=True)` under DDP against one process with the whole batch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ask_lightning import KnowledgeBase, ReliabilityOTLoss
from tests.helpers.ranks import on_ranks

WIDTH, INPUT, BATCH, PAIRS = 6, 5, 12, 40
OPTIONS = {
    "defaults": {},
    "row scaling": {"plan_scaling": "row"},
    "renormalised": {"renormalize_injected": True},
    "plan with gradient": {"detach_plan": False, "plan_scaling": "row"},
    "own rows left out": {"exclude_self": True},
    "captions of one clip": {"positives": "ids"},
    "weight of each sample": {"modulation": "sample"},
    "factor without gradient": {"modulation_gradient": False},
    "fine only": {"granularities": ("fine",)},
    "coarse only": {"granularities": ("coarse",)},
    "no knowledge": {"injection_ratio": 0.0, "lambda_fine": 0.0, "lambda_coarse": 0.0},
    "no transport": {"ot_factor": 0.0},
    "unbounded": {"lambda_coarse": 0.1},
    "agreement weighs": {"reliability_form": "agreement_factor"},
    "agreement is added": {"reliability_form": "agreement_term"},
    "disagreement is added": {"reliability_form": "disagreement_term", "lambda_fine": 1.5},
    "one matrix for both directions": {"a2t_realignment": "transposed_result", "plan_scaling": "row"},
    "one plan for both directions": {"a2t_realignment": "same_plan", "plan_scaling": "row"},
    "other coarse neighbours": {"num_coarse_neighbors": 2},
    "distinct clips": {"distinct_clips": True, "exclude_self": True},
    "plan of POT": {"transport_solver": "pot:sinkhorn_log", "plan_scaling": "row"},
    "noisy pairs left out": {"transport_solver": "pot:sinkhorn_unbalanced;reg_m=0.5", "plan_scaling": "row"},
    "teacher": {"distillation_weight": 0.6},
    "transport as the teacher": {"distillation_weight": 0.6, "teacher": "transport", "positives": "ids"},
    "interaction": {"interaction": lambda text, audio: torch.tanh(2 * text @ audio.T)},
}


class Towers(nn.Module):
    """Two linear encoders and a learnable temperature, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.audio, self.text = (
            nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator, dtype=torch.float64))
            for _ in range(2)
        )
        self.log_temperature = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return audio @ self.audio, text @ self.text, self.log_temperature.exp()


def step(rows: slice, name: str, ddp: bool, compiled: bool = False) -> dict[str, Tensor]:
    """The loss of some rows of the batch and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(1)
    audio, text = torch.randn(2, BATCH, INPUT, generator=generator, dtype=torch.float64)
    known = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    ids = torch.arange(BATCH) // 2
    knowledge = KnowledgeBase.from_embeddings(
        *known, ids=torch.arange(PAIRS) // 3, num_prototypes=7, normalize_prototypes=name != "unbounded"
    )
    towers = Towers()
    model = DistributedDataParallel(towers) if ddp else towers
    u, v, temperature = model(audio[rows], text[rows])
    options = {"num_neighbors": 4, "gather": True} | OPTIONS[name]
    loss = ReliabilityOTLoss(temperature=lambda: temperature, **options)
    if compiled:
        loss.compile(backend="eager")
    value = loss(u, v, ids=ids[rows], knowledge=knowledge)
    value.backward()
    terms = {f"term {key}": term for key, term in loss.last.items()}
    return terms | {key: parameter.grad for key, parameter in towers.named_parameters()}


def own_steps(bounds: list[int]) -> dict[str, dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    rows = slice(bounds[rank], bounds[rank + 1])
    return {name: step(rows, name, ddp=True) for name in OPTIONS}


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 6, 12],
        [0, 1, 12],
        pytest.param([0, 2, 7, 12], marks=pytest.mark.slow),
        pytest.param([0, 4, 8, 12], marks=pytest.mark.slow),
        pytest.param([0, 3, 6, 9, 12], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradient_is_that_of_one_process(bounds):
    results = on_ranks(len(bounds) - 1, own_steps, bounds)
    for name in OPTIONS:
        whole = step(slice(None), name, ddp=False)
        for rank, result in enumerate(results):
            assert result[name].keys() == whole.keys()
            for key, expected in whole.items():
                torch.testing.assert_close(
                    result[name][key],
                    expected,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda text, about=(name, rank, key): f"{about}: {text}",
                )


def compiled_steps(bounds: list[int]) -> dict[str, dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    rows = slice(bounds[rank], bounds[rank + 1])
    return {name: step(rows, name, ddp=True, compiled=True) for name in ("defaults", "teacher")}


def test_gradient_of_a_compiled_loss_is_that_of_one_process():
    for result in on_ranks(2, compiled_steps, [0, 2, 12]):
        for name, terms in result.items():
            for key, expected in step(slice(None), name, ddp=False).items():
                torch.testing.assert_close(terms[key], expected, rtol=1e-10, atol=1e-10)


def local_and_plain() -> tuple[Tensor, Tensor]:
    """`gather=False`, and the loss in evaluation mode before there is any knowledge."""
    rank = torch.distributed.get_rank()
    rows = slice(0, 5) if rank == 0 else slice(5, 12)
    generator = torch.Generator().manual_seed(1)
    audio, text = torch.randn(2, BATCH, WIDTH, generator=generator)
    knowledge = KnowledgeBase.from_embeddings(audio, text, num_prototypes=4)
    local = ReliabilityOTLoss(num_neighbors=3)(audio[rows], text[rows], knowledge=knowledge)
    alone = ReliabilityOTLoss(gather=True).eval()
    return local, alone(audio[rows], text[rows])


def test_without_gather_the_batch_is_the_local_one():
    (first, plain), (second, plain_too) = on_ranks(2, local_and_plain)
    generator = torch.Generator().manual_seed(1)
    audio, text = torch.randn(2, BATCH, WIDTH, generator=generator)
    knowledge = KnowledgeBase.from_embeddings(audio, text, num_prototypes=4)
    loss = ReliabilityOTLoss(num_neighbors=3)
    assert torch.equal(first, loss(audio[:5], text[:5], knowledge=knowledge))
    assert torch.equal(second, loss(audio[5:], text[5:], knowledge=knowledge))
    with pytest.warns(UserWarning, match="evaluates without knowledge"):
        expected = ReliabilityOTLoss().eval()(audio, text)
    torch.testing.assert_close(plain, expected)
    assert torch.equal(plain, plain_too)
