"""Caption ids in a base: which row a pair has, and what is kept of them."""

import random
from pathlib import Path

import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.knowledge.row_matching import match_rows, repeated_pairs
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.snapshot_file import find_complete_snapshot, read_snapshot
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks
from tests.helpers.vectors import directions

ROWS, WIDTH = 60, 6


def names(rows: int = ROWS) -> tuple[list[int], list[str]]:
    """Clips with one to many captions, in any order; every clip has captions that others have, too."""
    order = random.Random(3)
    pairs = [(order.randrange(9), f"caption {number % 11}") for number in range(rows * 9)]
    pairs = list(dict.fromkeys(pairs))[:rows]
    return [clip for clip, _ in pairs], [caption for _, caption in pairs]


def make(**options) -> KnowledgeBase:
    clips, captions = names()
    audio, text = directions(ROWS, WIDTH, 0), directions(ROWS, WIDTH, 1)
    settings = {"ids": clips, "caption_ids": captions, "num_prototypes": 5} | options
    return KnowledgeBase.from_embeddings(audio, text, **settings)


def test_rows_of_pairs_against_a_dictionary():
    clips, captions = names()
    row_of = {pair: row for row, pair in enumerate(zip(clips, captions, strict=True))}
    asked = [(clip, f"caption {number}") for clip in range(11) for number in range(13)]
    expected = [row_of.get(pair, -1) for pair in asked]
    assert -1 in expected
    assert sorted({*expected} - {-1}) == list(range(ROWS))
    found = make().rows_of_pairs(
        torch.tensor([clip for clip, _ in asked]), integer_ids([caption for _, caption in asked])
    )
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    assert make().rows_of_pairs(*torch.empty(2, 0, dtype=torch.int64)).tolist() == []


def test_a_sample_is_the_pair_of_its_caption_however_near_another_one_is():
    base = make()
    elsewhere = base.fine.text.roll(7, dims=0)
    assert match_rows(base, base.ids, elsewhere, base.caption_ids).tolist() == list(range(ROWS))
    assert match_rows(base, base.ids, elsewhere).tolist() != list(range(ROWS))


def test_repeated_pairs():
    assert repeated_pairs(make()).tolist() == []
    clips, captions = names()
    clips[40], captions[40] = clips[3], captions[3]
    clips[20], captions[20] = clips[3], captions[3]
    assert repeated_pairs(make(ids=clips, caption_ids=captions)).tolist() == [20, 40]


class TestKept:
    @pytest.mark.parametrize("storage", ["float32", "float16", "memmap"])
    def test_by_a_snapshot(self, storage, tmp_path):
        files = {"storage": storage, "directory": tmp_path} if storage == "memmap" else {"storage": storage}
        base = make(**files)
        base.save(tmp_path / "base.safetensors")
        loaded = KnowledgeBase.load(tmp_path / "base.safetensors")
        assert torch.equal(loaded.caption_ids, integer_ids(names()[1]))
        assert loaded.fingerprint == base.fingerprint

    def test_by_a_move(self):
        base = make()
        moved = base.to("meta")
        assert moved.caption_ids.device.type == "meta"
        assert base.caption_ids.device.type == "cpu"

    def test_in_the_fingerprint(self):
        other = names()[1]
        other[7] = "another one"
        prints = {make().fingerprint, make(caption_ids=other).fingerprint, make(caption_ids=None).fingerprint}
        assert len(prints) == 3

    def test_by_replaced_rows(self):
        base = make()
        before = base.caption_ids.clone()
        base.replace_rows(torch.tensor([3]), *directions(2, WIDTH, 5).split(1))
        assert torch.equal(base.caption_ids, before)


class TestWithout:
    def test_nothing_is_stored(self, tmp_path):
        path = tmp_path / "base.safetensors"
        base = make(caption_ids=None)
        base.save(path)
        assert base.caption_ids is None
        assert KnowledgeBase.load(path).caption_ids is None
        (file,) = find_complete_snapshot(path)
        assert "caption_ids" not in read_snapshot(file)[0]

    def test_the_fingerprint_is_that_of_the_other_tensors(self):
        base = KnowledgeBase.from_embeddings(
            torch.eye(4), torch.eye(4).flip(0), ids=[5, 5, 2, 5], num_prototypes=2
        )
        assert base.fingerprint == "3748e72816ff04e5"

    def test_pairs_cannot_be_found(self):
        ids = torch.tensor([3])
        with pytest.raises(ValueError, match=r"no caption ids\. Build it with them"):
            make(caption_ids=None).rows_of_pairs(ids, ids)


class TestRefused:
    def test_another_number(self):
        with pytest.raises(
            ValueError, match=r"`caption_ids` has to hold one id for each of the 60 pairs.*59"
        ):
            make(caption_ids=list(range(59)))

    def test_without_clips(self):
        with pytest.raises(
            ValueError, match=r"`caption_ids` tells the captions of a clip apart, so it needs"
        ):
            make(ids=None)

    def test_no_identifiers(self):
        with pytest.raises(ValueError, match=r"`caption_ids` has to be a vector of integers"):
            make(caption_ids=torch.rand(ROWS))


def built_on_ranks(folder: str, placement: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    ranks, (clips, captions) = Ranks.current(), names()
    shard = RowShard.interleaved(ROWS, ranks)
    own = shard.global_rows().tolist()
    base = KnowledgeBase.from_embeddings(
        *(directions(ROWS, WIDTH, seed)[own] for seed in (0, 1)),
        ids=[clips[row] for row in own],
        caption_ids=[captions[row] for row in own],
        num_prototypes=5,
        shard=shard,
        placement=placement,
    )
    path = Path(folder) / f"{placement}.safetensors"
    if placement == "sharded" or ranks.rank == 0:
        base.save(path)
    torch.distributed.barrier()
    loaded = KnowledgeBase.load(path, ranks=ranks if placement == "sharded" else None)
    rows = loaded.rows_of_pairs(loaded.ids[own], loaded.caption_ids[own])
    return base.caption_ids, rows, base.fingerprint


def test_every_rank_knows_all_captions(tmp_path):
    (captions, rows, fingerprint), (others, other_rows, same) = on_ranks(
        2, built_on_ranks, str(tmp_path), "sharded"
    )
    assert fingerprint == same
    assert torch.equal(captions, integer_ids(names()[1]))
    assert torch.equal(captions, others)
    assert rows.tolist() == list(range(0, ROWS, 2))
    assert other_rows.tolist() == list(range(1, ROWS, 2))
    loaded = KnowledgeBase.load(tmp_path / "sharded.safetensors")
    assert torch.equal(loaded.caption_ids, captions)
