"""The losses without knowledge under DDP, over uneven batches, against one process with the whole batch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ask_lightning import HardNegativeLoss, NTXentLoss, SigmoidLoss, TripletLoss
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks

WIDTH, INPUT = 6, 5
# Clips 3 and 5 have samples on both ranks.
CLIPS = torch.tensor([3, 3, 4, 5, 6, 14, 7, 8, 5, 3, 10, 15])
LOSSES = {
    "ntxent": lambda towers: NTXentLoss(towers.temperature, gather=True),
    "smoothed": lambda towers: NTXentLoss(
        towers.temperature, label_smoothing=0.2, positives="ids", gather=True
    ),
    "same clip": lambda towers: NTXentLoss(towers.temperature, positives="same_clip", gather=True),
    "decoupled": lambda towers: NTXentLoss(towers.temperature, decoupled=True, positives="ids", gather=True),
    "hardest": lambda towers: TripletLoss(0.5, positives="ids", gather=True),
    "all triplets": lambda towers: TripletLoss(0.5, negatives="all", gather=True),
    "sigmoid": lambda towers: SigmoidLoss(
        towers.temperature, towers.bias, positives="same_clip", gather=True
    ),
    "hard negatives": lambda towers: HardNegativeLoss(
        towers.temperature, 0.5, positive_prior=0.02, positives="same_clip", gather=True
    ),
}


class Towers(nn.Module):
    """Two encoders, and the scalars that some losses learn."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.audio, self.text = (
            nn.Parameter(torch.randn(INPUT, WIDTH, generator=generator, dtype=torch.float64))
            for _ in range(2)
        )
        self.temperature, self.bias = (
            nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (0.2, -1.0)
        )

    def forward(self, audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return audio @ self.audio, text @ self.text


def step(rows: slice, name: str, ddp: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    audio, text = torch.randn(2, len(CLIPS), INPUT, generator=generator, dtype=torch.float64)
    towers = Towers()
    loss = LOSSES[name](towers)
    unused = {"temperature", "bias"} - set(loss.borrowed_parameters)
    for parameter in unused:
        getattr(towers, parameter).requires_grad_(False)
    model = DistributedDataParallel(towers) if ddp else towers
    value = loss(*model(audio[rows], text[rows]), ids=CLIPS[rows] if loss.needs_ids else None)
    value.backward()
    terms = {f"term {key}": term for key, term in loss.last.items()}
    gradients = {key: part.grad for key, part in towers.named_parameters() if key not in unused}
    return terms | gradients


def own_steps(bounds: list[int]) -> dict[str, dict[str, Tensor]]:
    rank = Ranks.current().rank
    return {name: step(slice(bounds[rank], bounds[rank + 1]), name, ddp=True) for name in LOSSES}


# A rank with a single pair has no negative of its own.
@pytest.mark.parametrize("bounds", [[0, 1, 12], pytest.param([0, 2, 7, 12], marks=pytest.mark.slow)], ids=str)
def test_gradient_is_that_of_one_process(bounds):
    ranks = on_ranks(len(bounds) - 1, own_steps, bounds)
    for name in LOSSES:
        alone = step(slice(0, len(CLIPS)), name, ddp=False)
        assert alone["term loss"] > 0
        for rank in ranks:
            assert set(rank[name]) == set(alone)
            for key, value in alone.items():
                torch.testing.assert_close(rank[name][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_in_one_process_gathering_changes_nothing(name):
    generator = torch.Generator().manual_seed(2)
    audio, text = torch.randn(2, len(CLIPS), WIDTH, generator=generator, dtype=torch.float64)
    loss = LOSSES[name](Towers())
    gathered = loss(audio, text, ids=CLIPS)
    loss.gather = False
    assert loss(audio, text, ids=CLIPS) == gathered
