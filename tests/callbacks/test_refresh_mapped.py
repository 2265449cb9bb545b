"""`mode="mapped"`: a sample is encoded, the other rows follow by a map."""

import pytest
import torch
from torch import nn

from ask_lightning import KnowledgeRefreshCallback
from ask_lightning.callbacks import MappedRefresh
from ask_lightning.callbacks.partial_refresh import sample_items
from ask_lightning.functional import unit_length
from ask_lightning.knowledge.mapping import choose_held_out, fit_row_map
from tests.helpers.clients import Pairs, PlainTowers
from tests.helpers.distributed_run import PairData
from tests.helpers.interrupted_run import Stop, Stopped
from tests.helpers.ranks import on_ranks
from tests.helpers.renewal_run import assert_goes_on, fit, logged
from tests.helpers.vectors import directions

ROWS, SAMPLE = 300, 100


class ManyPairs(PairData):
    """300 pairs in batches of 50: six steps an epoch."""

    def __init__(self) -> None:
        super().__init__(50)

    def train_dataloader(self):
        from torch.utils.data import DataLoader

        from ask_lightning.data import EpochSampler

        pairs, size = Pairs(ROWS), self.trainer.world_size
        sampler = EpochSampler(pairs, num_replicas=size, rank=self.trainer.global_rank, seed=0)
        return DataLoader(pairs, self.batch_size // size, sampler=sampler, drop_last=True)


class Turning(PlainTowers):
    """Encoders whose output turns by a fixed rotation in each epoch, and learns nothing."""

    def __init__(self, rounds: float = 1.0) -> None:
        super().__init__(0.0)
        skew = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
        self.register_buffer("turn", torch.linalg.matrix_exp(rounds * (skew - skew.T)))
        self.register_buffer("present", torch.eye(8))

    def on_train_epoch_end(self):
        self.present = self.present @ self.turn

    def encode_audio(self, batch):
        return super().encode_audio(batch) @ self.present

    def encode_text(self, batch):
        return super().encode_text(batch) @ self.present


def run(epochs=3, **options) -> dict:
    return fit(**{"data": ManyPairs(), "T": 1, "mode": "mapped", "epochs": epochs, **options})


def test_a_turn_is_followed_from_a_sample():
    seen = run(model=Turning())
    assert logged(seen, "ask/encoded_share") == pytest.approx([1, 1 / 3, 1 / 3])
    assert logged(seen, "ask/mapped_recall_audio") == [1, 1]
    assert max(logged(seen, "ask/old_recall_audio")) < 0.9
    for stored, fresh in zip(seen["stored"], seen["fresh"], strict=True):
        torch.testing.assert_close(stored, fresh, atol=1e-4, rtol=0)
    assert logged(seen, "ask/row_age_max") == [0, 1, 2], "a mapped row was not encoded"


def test_what_no_map_explains_is_encoded():
    class Reshuffled(PlainTowers):
        """Other random encoders in each epoch, which are not linear in one another."""

        def __init__(self):
            super().__init__(0.0)
            self.register_buffer("epoch", torch.zeros(()))

        def on_train_epoch_end(self):
            self.epoch += 1

        def encode_audio(self, batch):
            return torch.frac(1e4 * torch.sin(batch["audio"][:, :8] * (1 + self.epoch))) - 0.5

    seen = run(model=Reshuffled(), epochs=2)
    assert logged(seen, "ask/encoded_share") == [1, 1]
    torch.testing.assert_close(seen["stored"][1], seen["fresh"][1], atol=1e-5, rtol=0)
    assert logged(seen, "ask/mapped_recall_audio") == logged(seen, "ask/old_recall_audio")


def test_encoders_that_stand_still_keep_their_rows():
    class Still(PlainTowers):
        def __init__(self):
            super().__init__(0.0)

    seen = run(model=Still(), epochs=2)
    assert logged(seen, "ask/encoded_share") == pytest.approx([1, 1 / 3])
    torch.testing.assert_close(seen["stored"][1], seen["stored"][0], atol=1e-6, rtol=0)


def test_resumed_exactly(tmp_path):
    whole = run(epochs=4)
    with pytest.raises(Stopped):
        fit(1, tmp_path / "one", data=ManyPairs(), T=1, mode="mapped", epochs=4, extra=(Stop(2),))
    resumed = run(epochs=4, resume=tmp_path / "one" / "last.ckpt")
    assert_goes_on(resumed, whole, 2)


def two_ranks(placement: str) -> dict:
    return fit(2, data=ManyPairs(), T=1, mode="mapped", epochs=2, placement=placement, model=Turning())


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_on_two_ranks(placement):
    one, other = on_ranks(2, two_ranks, placement, grouped=False)
    assert one["knowledge"] == other["knowledge"]
    for seen in (one, other):
        torch.testing.assert_close(seen["stored"][1], seen["fresh"][1], atol=1e-4, rtol=0)


class TestMaps:
    def test_the_better_one_is_chosen(self):
        """A turn is best by Procrustes, a stretch by ridge regression, noise by neither."""
        old = directions(400, 12, 0)
        held_out = torch.arange(400) < 120
        turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
        stretch = torch.diag(torch.tensor([4.0, 4.0, 4.0, *[1.0] * 9]))
        turned, stretched = (
            fit_row_map(old, old @ turn, held_out),
            fit_row_map(old, unit_length(old @ stretch), held_out),
        )
        assert turned.recall == 1
        torch.testing.assert_close(turned(old), old @ turn, atol=1e-3, rtol=0)
        assert stretched.recall > stretched.old_recall
        assert stretched.matrix is not None
        assert (stretched.matrix @ stretched.matrix.T - torch.eye(12)).abs().max() > 0.1
        torch.testing.assert_close(stretched(old).norm(dim=1), torch.ones(400))

    def test_noise_is_explained_by_no_map(self):
        old = directions(400, 12, 0)
        noisy = nn.functional.normalize(old + 0.3 * directions(400, 12, 1), dim=1)
        found = fit_row_map(old, noisy, torch.arange(400) < 120)
        if found.matrix is None:
            assert not found.is_useful
            assert found.recall == found.old_recall
        else:
            assert found.recall > found.old_recall

    def test_held_out_rows_are_of_other_items(self):
        chosen = choose_held_out(600, 5, seed=0)
        assert chosen.sum() == 180
        assert all(len(item.unique()) == 1 for item in chosen.view(-1, 5))
        assert not choose_held_out(20, 1, seed=0).any(), "too few to judge by"
        assert choose_held_out(100_000, 1, seed=0).sum() == 2048


def test_samples_differ_from_epoch_to_epoch():
    one, other = (sample_items(ROWS, 0.1, epoch, seed=0) for epoch in (1, 2))
    assert len(one) == len(other) == SAMPLE
    assert not torch.equal(one, other)
    assert torch.equal(one, sample_items(ROWS, 0.1, 1, seed=0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KnowledgeRefreshCallback(mode="half"), "`mode` has to be one of"),
        (lambda: MappedRefresh(0), "`sample_share` has to be positive"),
        (lambda: MappedRefresh(2), r"`sample_share` has to be in \[0, 1\]"),
        (
            lambda: KnowledgeRefreshCallback(mode=MappedRefresh(0.2), write_back=True),
            '`mode="mapped"` and `write_back=True` exclude each other',
        ),
        (
            lambda: KnowledgeRefreshCallback(mode="mapped", refine="graph"),
            '`refine` and `mode="mapped"` exclude each other',
        ),
    ],
)
def test_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()
