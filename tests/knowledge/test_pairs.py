"""`StoredPairs` and `Neighborhood`."""

import dataclasses
import pickle

import pytest
import torch

from ask_lightning.functional import representation_drift
from ask_lightning.knowledge.pairs import Neighborhood, StoredPairs, read_neighborhood
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.sharded_pairs import ShardedPairs
from tests.helpers import reference
from tests.helpers.vectors import directions


def pairs(rows: int = 30, width: int = 5) -> StoredPairs:
    return StoredPairs(directions(rows, width, 0), directions(rows, width, 1))


def found() -> Neighborhood:
    rows = torch.arange(12).view(2, 2, 3)
    return read_neighborhood(pairs(), rows[0], rows[1])


@pytest.mark.parametrize(
    ("length", "is_bounded"), [(0.5, True), (1 + 1e-6, True), (1 + 1e-4, False), (5, False)]
)
def test_rows_that_are_too_long_are_noticed_in_either_modality(length, is_bounded):
    rows = torch.zeros(3, 2)
    rows[1] = length * torch.tensor([0.6, 0.8])
    for sides in ((torch.eye(3)[:, :2], rows), (rows, torch.eye(3)[:, :2])):
        assert StoredPairs(*sides).is_bounded is is_bounded
    assert StoredPairs(torch.empty(0, 2), torch.empty(0, 2)).is_bounded


def test_indexes_do_not_travel():
    stored = pairs()
    _ = stored.search_audio
    copy = pickle.loads(pickle.dumps(stored))
    assert "search_audio" not in vars(copy)
    assert torch.equal(copy.audio, stored.audio)


def test_drift_is_the_functional_one():
    now, before, rows = (
        pairs(),
        StoredPairs(directions(30, 5, 2), directions(30, 5, 3)),
        torch.arange(0, 30, 4),
    )
    audio, text = now.drift_from(before, rows)
    assert audio == representation_drift(now.audio[rows], now.audio, before.audio)
    assert text == representation_drift(now.text[rows], now.text, before.text)


def test_a_single_shard_of_all_rows_is_the_whole():
    stored = pairs()
    sharded = ShardedPairs(stored, RowShard.unsharded(len(stored)))
    queries, rows = directions(4, 5, 7), torch.tensor([[3, 29], [0, 3]])
    assert len(sharded) == 30
    for name in ("audio", "text"):
        assert torch.equal(getattr(sharded, name), getattr(stored, name))
        one, other = (getattr(side, f"search_{name}")(queries, 6) for side in (sharded, stored))
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert (sharded.is_bounded, sharded.checksums) == (stored.is_bounded, stored.checksums)
    for one, other in zip(sharded.pairs(rows), stored.pairs(rows), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(sharded.mean, stored.mean, strict=True):
        torch.testing.assert_close(one, other)
    older = StoredPairs(directions(30, 5, 2), directions(30, 5, 3))
    drifts = sharded.drift_from(older, torch.arange(30)), stored.drift_from(older, torch.arange(30))
    torch.testing.assert_close(*drifts)


class TestNeighborhood:
    def test_another_dtype_for_vectors_only(self):
        half = found().to(torch.float16)
        assert half.audio_rows.dtype == half.text_rows.dtype == torch.int64
        assert half.audio_by_audio.dtype == half.text_by_text.dtype == torch.float16

    def test_maps_rows_and_vectors_apart(self):
        hood = found()
        moved = hood.map_rows(lambda rows: rows + 1)
        assert torch.equal(moved.audio_rows, hood.audio_rows + 1)
        assert torch.equal(moved.text_rows, hood.text_rows + 1)
        assert moved.audio_by_text is hood.audio_by_text
        doubled = hood.map_vectors(lambda vectors: 2 * vectors)
        for name in ("audio_by_audio", "audio_by_text", "text_by_audio", "text_by_text"):
            assert torch.equal(getattr(doubled, name), 2 * getattr(hood, name))
        assert doubled.audio_rows is hood.audio_rows

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            found().audio_rows = torch.zeros(1)


def test_potentials_of_both_directions():
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(2, 3, dtype=torch.int64)
    vectors = torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64)
    found = Neighborhood(rows, rows, *vectors)
    audio, text = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    potentials = found.potentials(audio, text)
    assert list(potentials) == ["t2a", "a2t"]
    for direction, query, crossed, own in (("t2a", audio, 1, 0), ("a2t", text, 2, 3)):
        expected = reference.reliability_potential(
            query.numpy(), vectors[crossed].numpy(), vectors[own].numpy()
        )
        torch.testing.assert_close(potentials[direction], torch.from_numpy(expected))
