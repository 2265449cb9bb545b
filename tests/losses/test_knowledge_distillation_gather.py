"""`KnowledgeDistillationLoss` under DDP against one process with the whole batch, wherever the rows lie."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ask_lightning import KnowledgeBase, KnowledgeDistillationLoss
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks

WIDTH, INPUT, BATCH, PAIRS = 6, 5, 12, 41
OPTIONS = {
    "softmax": {},
    "transport": {"teacher": "transport"},
    "captions of one clip": {"positives": "ids"},
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


def base_of(placement: str, ranks: Ranks) -> KnowledgeBase:
    """Clips of three rows each, without the clips 14 and 15 of the batch."""
    generator = torch.Generator().manual_seed(1)
    audio, text = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    shard = RowShard.interleaved(PAIRS, ranks)
    rows = shard.global_rows()
    return KnowledgeBase.from_embeddings(
        audio[rows], text[rows], ids=rows // 3, num_prototypes=7, placement=placement, shard=shard
    )


def step(rows: slice, name: str, base: KnowledgeBase, ddp: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    audio, text = torch.randn(2, BATCH, INPUT, generator=generator, dtype=torch.float64)
    ids = torch.tensor([3, 3, 4, 5, 6, 14, 7, 8, 9, 3, 10, 15])
    towers = Towers()
    model = DistributedDataParallel(towers) if ddp else towers
    loss = KnowledgeDistillationLoss(0.2, teacher_temperature=0.3, gather=True, **OPTIONS[name])
    value = loss(*model(audio[rows], text[rows]), ids=ids[rows], knowledge=base)
    value.backward()
    terms = {f"term {key}": term for key, term in loss.last.items()}
    return terms | {key: parameter.grad for key, parameter in towers.named_parameters()}


def own_steps(bounds: list[int], placement: str) -> dict[str, dict[str, Tensor]]:
    ranks = Ranks.current()
    base = base_of(placement, ranks)
    assert base.is_sharded == (placement == "sharded")
    rows = slice(bounds[ranks.rank], bounds[ranks.rank + 1])
    return {name: step(rows, name, base, ddp=True) for name in OPTIONS}


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize("bounds", [[0, 5, 12], pytest.param([0, 2, 7, 12], marks=pytest.mark.slow)], ids=str)
def test_gradient_is_that_of_one_process(bounds, placement):
    base = base_of("replicated", Ranks())
    ranks = on_ranks(len(bounds) - 1, own_steps, bounds, placement)
    for name in OPTIONS:
        alone = step(slice(0, BATCH), name, base, ddp=False)
        assert alone["term unknown_clips"] == 2
        for rank in ranks:
            for key, value in alone.items():
                torch.testing.assert_close(rank[name][key], value, rtol=1e-10, atol=1e-12)
