"""Rows of a base that are replaced in place, and the rows that the samples of a batch are."""

import numpy as np
import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.knowledge.row_matching import match_rows
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_bases import build
from tests.helpers.vectors import directions, sorted_search, tensors_of

ROWS, WIDTH = 40, 8


def make(**options) -> KnowledgeBase:
    audio, text = directions(ROWS, WIDTH, 0), directions(ROWS, WIDTH, 1)
    return KnowledgeBase.from_embeddings(audio, text, **{"num_prototypes": 4, **options})


def other(rows: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * directions(rows, WIDTH, seed), 0.1 * directions(rows, WIDTH, seed + 1)


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("index", ["auto", "exact", "Flat"])
def test_the_base_is_one_that_had_these_rows_from_the_start(index, storage):
    base, rows = make(index=index, storage=storage), torch.tensor([3, 17, 0])
    queries = directions(150, WIDTH, 9), directions(150, WIDTH, 10)
    base.lookup(*queries, 5)  # so that there are indexes
    before, prototypes = base.fingerprint, base.coarse.audio.clone()
    new = other(3)
    base.replace_rows(rows, *new)
    expected = [directions(ROWS, WIDTH, seed, torch.float64) for seed in (0, 1)]
    for side, given, stored in zip(expected, new, (base.fine.audio, base.fine.text), strict=True):
        side[rows] = given.double() / given.double().norm(dim=1, keepdim=True)
        tolerance = 1e-3 if storage == "float16" else 2e-7
        np.testing.assert_allclose(stored.double().numpy(), side.numpy(), atol=tolerance)
    found = base.lookup(*queries, 5)["fine"]
    assert np.array_equal(found.audio_rows.numpy(), sorted_search(base.fine.audio, queries[0], 5)[1])
    assert np.array_equal(found.text_rows.numpy(), sorted_search(base.fine.text, queries[1], 5)[1])
    assert base.fingerprint != before
    assert torch.equal(base.coarse.audio, prototypes)
    fresh = KnowledgeBase(type(base.fine)(base.fine.audio, base.fine.text), base.coarse, base.ids)
    assert base.fingerprint == fresh.fingerprint


def test_indexes_keep_what_they_have_learnt():
    pytest.importorskip("faiss")
    base = make(index="IVF2,Flat;nprobe=2")
    base.lookup(*other(3), 5)
    learnt = base.fine.local.learnt
    base.replace_rows(torch.tensor([3]), *other(1))
    assert base.fine.local.learnt == learnt
    found = base.lookup(*other(3), 5)["fine"]
    assert base.fine.local.learnt[0] is learnt[0] is not None
    assert np.array_equal(found.audio_rows.numpy(), sorted_search(base.fine.audio, other(3)[0], 5)[1])


def test_a_snapshot_holds_the_new_rows(tmp_path):
    base = make()
    base.fingerprint  # noqa: B018 - cached before
    base.replace_rows(torch.tensor([1]), *other(1))
    base.save(tmp_path / "base.safetensors")
    loaded = KnowledgeBase.load(tmp_path / "base.safetensors")
    assert all(torch.equal(one, tensors_of(loaded)[name]) for name, one in tensors_of(base).items())
    assert loaded.fingerprint == base.fingerprint


def test_of_a_row_that_occurs_twice_the_last_counts():
    base, (audio, text) = make(), other(4)
    base.replace_rows(torch.tensor([5, 6, 5, 5]), audio, text)
    torch.testing.assert_close(base.fine.audio[[5, 6]], audio[[3, 1]] / 3)
    torch.testing.assert_close(base.fine.text[[5, 6]], text[[3, 1]] * 10)


def test_the_teacher_sees_the_new_rows_to_the_bit():
    ids = torch.arange(ROWS) // 4
    base = make(ids=ids)
    base.find_clips(ids[:1])
    base.replace_rows(torch.tensor([2, 9, 10]), *other(3))
    anew = KnowledgeBase(base.fine, base.coarse, base.ids)
    clips = torch.tensor([0, 2, 7, 99])
    for name in ("audio", "text", "known"):
        assert torch.equal(getattr(base.find_clips(clips), name), getattr(anew.find_clips(clips), name))


@pytest.mark.parametrize(
    ("rows", "count", "text"),
    [
        (
            [ROWS],
            1,
            rf"Argument `rows` has to hold row numbers in \[0, {ROWS}\), but got numbers from 40 to 40",
        ),
        ([-1, 3], 2, "but got numbers from -1 to 3"),
        ([1], 2, r"Arguments `audio` and `text` have to be of shape \(1, 8\).*but got \(2, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(rows, count, text):
    with pytest.raises(ValueError, match=text):
        make().replace_rows(torch.tensor(rows), *other(count))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_rows_are_refused(value):
    base, (audio, text) = make(), other(3)
    before, text[1, 2] = base.fingerprint, value
    with pytest.raises(ValueError, match=r"1 of the 3 rows to replace contain NaN or Inf .*is row 9\)"):
        base.replace_rows(torch.tensor([4, 9, 2]), audio, text)
    assert KnowledgeBase(base.fine, base.coarse, base.ids).fingerprint == before


def test_nothing_to_replace():
    base = make()
    before = base.fingerprint
    base.replace_rows(torch.tensor([], dtype=torch.int64), *other(0))
    assert base.fingerprint == before


def test_rows_of_clips():
    base = make(ids=torch.tensor([9, 3, 9, 9, *range(100, 100 + ROWS - 4)]))
    rows = base.rows_of_clips(torch.tensor([3, 9, 1000, 139, 0]))
    assert rows.tolist() == [[1, -1, -1], [0, 2, 3], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]]


def test_a_sample_is_the_pair_whose_caption_is_nearest():
    """Of 10 clips with four captions each, seen again after a little drift."""
    base = make(ids=torch.arange(ROWS) // 4)
    rows = torch.tensor([13, 2, 39, 20])
    drifted = base.fine.text[rows] + 0.1 * directions(4, WIDTH, 7)
    assert match_rows(base, rows // 4, drifted).tolist() == rows.tolist()
    assert match_rows(base, torch.tensor([77]), drifted[:1]).tolist() == [-1]


def replaced_on_ranks(kind: str, placement: str) -> dict:
    base = build(20, kind, placement=placement)
    generator = torch.Generator().manual_seed(0)
    audio, text = torch.randn(2, 5, base.width, generator=generator)
    rows = torch.tensor([19, 0, 7, 7, 12])
    queries = torch.randn(2, 4, base.width, generator=generator)
    base.lookup(*queries, 3)
    base.find_clips(base.ids[:2])
    base.replace_rows(rows, audio, text)
    clips = base.find_clips(base.ids[:20])
    return {
        "rows": (base.fine.audio, base.fine.text),
        "found": base.lookup(*queries, 3)["fine"].audio_rows,
        "clips": torch.cat([clips.audio, clips.text]),
        "matched": match_rows(base, base.ids[rows], text),
        "fingerprint": base.fingerprint,
    }


@pytest.mark.parametrize(
    ("kind", "placement"), [("five at a time", "sharded"), ("interleaved", "replicated")]
)
def test_on_two_ranks(kind, placement):
    (one, other_rank), alone = (
        on_ranks(2, replaced_on_ranks, kind, placement),
        replaced_on_ranks(kind, "replicated"),
    )
    assert one["fingerprint"] == other_rank["fingerprint"]
    for result in (one, other_rank):
        for name in ("rows", "clips"):
            torch.testing.assert_close(result[name], alone[name])
        assert torch.equal(result["found"], alone["found"])
        assert result["matched"].tolist() == alone["matched"].tolist()
    if kind != "interleaved":  # the third text was replaced by the fourth
        assert one["matched"][[0, 1, 3, 4]].tolist() == [19, 0, 7, 12]
