"""Losses with a queue or mined negatives on several ranks against one process with the whole batches."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ask_lightning import KnowledgeBase
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.losses import (
    CrossBatchMemoryLoss,
    HardNegativeMiningLoss,
    KnowledgeDistillationLoss,
    MomentumContrastLoss,
    NearestNeighborContrastiveLoss,
    ReliabilityOTLoss,
    RetrievalLoss,
)
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks

WIDTH, INPUT, BATCH, STEPS, STORED = 6, 5, 12, 4, 40
LOSSES = {
    "memory": lambda **options: CrossBatchMemoryLoss(0.2, 30, start_step=1, **options),
    "memory without ids": lambda **options: CrossBatchMemoryLoss(
        0.2, 30, start_step=0, positives="diagonal", **options
    ),
    "momentum": lambda **options: MomentumContrastLoss(0.2, 30, momentum=0.5, **options),
    "neighbors": lambda **options: NearestNeighborContrastiveLoss(0.2, 20, **options),
    "mining": lambda **options: HardNegativeMiningLoss(0.2, 3, num_candidates=15, **options),
    "mining without filter": lambda **options: HardNegativeMiningLoss(
        0.2, 4, num_candidates=15, false_negative_threshold=None, positives="diagonal", **options
    ),
}


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.audio, self.text = (
            nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator, dtype=torch.float64))
            for _ in range(2)
        )

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return audio @ self.audio, text @ self.text


def base_of(ranks: Ranks, placement: str) -> KnowledgeBase:
    """Two rows a clip, spread over the ranks."""
    generator = torch.Generator().manual_seed(1)
    audio, text = torch.randn(2, STORED, WIDTH, generator=generator, dtype=torch.float64)
    shard = RowShard.interleaved(STORED, ranks)
    rows = shard.global_rows()
    return KnowledgeBase.from_embeddings(
        audio[rows], text[rows], ids=rows // 2, num_prototypes=5, shard=shard, placement=placement
    )


def train(loss: RetrievalLoss, bounds: list[int], base: KnowledgeBase) -> dict[str, Tensor]:
    """A few steps on this rank's rows of each batch: every loss and gradient, and the state at the end."""
    ranks = Ranks.current()
    rows = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    towers = Towers()
    model = DistributedDataParallel(towers) if ranks.size > 1 else towers
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.2)
    seen: dict[str, Tensor] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 + step)
        audio, text = torch.randn(2, BATCH, INPUT, generator=generator, dtype=torch.float64)
        text = text + audio
        ids = torch.randint(25, (BATCH,), generator=generator)
        audio, text, ids = audio[rows], text[rows], ids[rows]
        if loss.needs_keys:
            loss.make_keys(towers, lambda copy, audio=audio, text=text: copy(audio, text), step)
        value = loss(*model(audio, text), ids=ids if loss.needs_ids else None, knowledge=base)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen |= {f"{step} {name}": term for name, term in loss.last.items()}
        seen |= {f"{step} gradient {name}": side.grad.clone() for name, side in towers.named_parameters()}
    return seen | {f"queue {name}": side for name, side in loss.training_state().get("queue", {}).items()}


def train_all(bounds: list[int], placement: str, gather: bool) -> dict[str, dict[str, Tensor]]:
    base = base_of(Ranks.current(), placement)
    return {name: train(make(gather=gather), bounds, base) for name, make in LOSSES.items()}


@pytest.mark.parametrize(
    ("bounds", "placement"),
    [
        ([0, 5, 12], "replicated"),
        ([0, 1, 12], "sharded"),
        pytest.param([0, 2, 7, 12], "sharded", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradient_is_that_of_one_process(bounds, placement):
    alone = train_all([0, BATCH], "replicated", True)
    assert alone["mining"]["3 mined_negatives"] > 0
    assert alone["neighbors"]["3 neighbor_similarity"] > 0
    assert alone["memory"]["3 same_clip_in_queue"] > 0
    for rank in on_ranks(len(bounds) - 1, train_all, bounds, placement, True):
        for name, seen in alone.items():
            assert rank[name].keys() == seen.keys()
            for key, value in seen.items():
                torch.testing.assert_close(
                    rank[name][key], value, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
                )


def test_local_batches_share_one_queue():
    """With `gather=False` each rank contrasts its own batch, with what all ranks have queued."""
    first, second = on_ranks(2, train_all, [0, 5, 12], "replicated", False)
    for name in LOSSES:
        for key, rows in first[name].items():
            assert "queue " not in key or torch.equal(rows, second[name][key])
        assert first[name]["3 loss"] != second[name]["3 loss"]
    assert len(first["memory"]["queue ids"]) == 30
    # Until there is a queue each loss is that of the local batch alone.
    local = train(LOSSES["memory"](gather=False), [0, 5], base_of(Ranks(), "replicated"))
    torch.testing.assert_close(first["memory"]["0 loss"], local["0 loss"], rtol=1e-12, atol=0)


def test_a_rank_with_a_single_pair_keeps_up():
    """What it left out, the other ranks would wait for; its own negatives are those of the queue or base."""
    first, second = on_ranks(2, train_all, [0, 1, 12], "sharded", False)
    for name in LOSSES:
        assert first[name].keys() == second[name].keys()
        assert all(value.isfinite().all() for value in first[name].values() if value.is_floating_point())
        for key, rows in first[name].items():
            assert "queue " not in key or torch.equal(rows, second[name][key])
    assert min(first[name]["3 loss"] for name in ("memory", "momentum", "mining without filter")) > 0
    assert first["memory"]["0 loss"] == 0  # without a queue a single pair has no negative


def train_with_knowledge() -> list[float]:
    """Losses whose knowledge is spread over the ranks, of which one has a single pair."""
    base = base_of(Ranks.current(), "sharded")
    rows = slice(0, 1) if Ranks.current().rank == 0 else slice(1, 6)
    audio, text = torch.randn(
        2, BATCH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    losses = ReliabilityOTLoss(temperature=0.2), KnowledgeDistillationLoss(temperature=0.2)
    return [
        loss(audio[rows], text[rows], ids=torch.arange(12)[rows], knowledge=base).item() for loss in losses
    ]


def test_a_single_pair_looks_up_spread_knowledge_with_the_others():
    alone, others = on_ranks(2, train_with_knowledge)
    assert alone == [0, 0]
    assert min(others) > 0
