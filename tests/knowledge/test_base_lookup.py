"""`KnowledgeBase.lookup` against loops over float64 rows."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge import KnowledgeBase, Neighborhood, StoredPairs, exact_search
from tests.helpers import reference
from tests.helpers.vectors import directions, generator, tensors_in, whole_numbers

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
FIELDS = ("audio_rows", "text_rows", "audio_by_audio", "audio_by_text", "text_by_audio", "text_by_text")


def make(rows: int = 50, width: int = 6, *, dtype=torch.float64, **options) -> KnowledgeBase:
    audio, text = directions(rows, width, 0, dtype), directions(rows, width, 1, dtype)
    return KnowledgeBase.from_embeddings(audio, text, **{"num_prototypes": 12, "index": "exact", **options})


def query(batch: int = 7, width: int = 6, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return directions(batch, width, 2, dtype), directions(batch, width, 3, dtype)


def expected_neighborhood(
    side, audio, text, k, query_ids=None, base_ids=None, distinct=False
) -> dict[str, np.ndarray]:
    base_audio, base_text = side.audio.double().numpy(), side.text.double().numpy()
    by_audio = reference.top_k(audio.double().numpy(), base_audio, k, query_ids, base_ids, distinct)
    by_text = reference.top_k(text.double().numpy(), base_text, k, query_ids, base_ids, distinct)
    batch = range(len(audio))
    return {
        "audio_rows": by_audio,
        "text_rows": by_text,
        "audio_by_audio": np.array([[base_audio[j] for j in by_audio[i]] for i in batch]),
        "audio_by_text": np.array([[base_audio[j] for j in by_text[i]] for i in batch]),
        "text_by_audio": np.array([[base_text[j] for j in by_audio[i]] for i in batch]),
        "text_by_text": np.array([[base_text[j] for j in by_text[i]] for i in batch]),
    }


def check(found: Neighborhood, expected: dict[str, np.ndarray]) -> None:
    assert tuple(field.name for field in fields(found)) == FIELDS
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name).numpy(), expected[name], err_msg=name)


@pytest.mark.parametrize("k", [1, 5, 12, 30, 50])  # 30 and 50: fewer prototypes than neighbours
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("blocks", [None, (40, 3)])
def test_agrees_with_loops(monkeypatch, blocks, normalize, k):
    if blocks:
        monkeypatch.setattr(exact_search, "_SCORES_PER_BLOCK", blocks[0])
        monkeypatch.setattr(exact_search, "_QUERIES_PER_BLOCK", blocks[1])
    base, (audio, text) = make(normalize_prototypes=normalize), query()
    found = base.lookup(audio, text, k)
    assert list(found) == ["fine", "coarse"]
    check(found["fine"], expected_neighborhood(base.fine, audio, text, k))
    check(found["coarse"], expected_neighborhood(base.coarse, audio, text, min(k, 12)))
    assert found["fine"].audio_rows.dtype == torch.int64
    assert found["coarse"].text_by_audio.shape == (7, min(k, 12), 6)


def test_equal_scores_are_ordered_by_row():
    """Five captions per clip: five rows with one audio embedding."""
    audio, text = whole_numbers(60, 3, 0, dtype=torch.float64), whole_numbers(60, 3, 1, dtype=torch.float64)
    base = KnowledgeBase(StoredPairs(audio, text), StoredPairs(audio[:20], text[:20]), torch.arange(60))
    queries = whole_numbers(9, 3, 2, dtype=torch.float64), whole_numbers(9, 3, 3, dtype=torch.float64)
    for k in (1, 7, 31, 60):
        found = base.lookup(*queries, k)
        check(found["fine"], expected_neighborhood(base.fine, *queries, k))
        check(found["coarse"], expected_neighborhood(base.coarse, *queries, min(k, 20)))


RAGGED = [1, 4, 1, 6, 2, 3, 1, 5, 2, 6, 4, 1, 3, 6, 5]  # rows per clip; 50 in all


def ragged_ids(seed: int = 0) -> torch.Tensor:
    """Rows of a clip are scattered over the base."""
    ids = torch.arange(len(RAGGED)).repeat_interleave(torch.tensor(RAGGED)) * 7 - 20
    return ids[torch.randperm(50, generator=generator(seed))]


@pytest.mark.parametrize("k", [1, 5, 44])  # 44 = 50 - 6: all rows that every query has left
@pytest.mark.parametrize("kind", ["tensor", "list", "numpy", "strings", "int32"])
def test_own_rows_are_left_out(kind, k):
    ids = ragged_ids()
    own = ids[[0, 10, 20, 30, 40, 49]].tolist()
    own.append(1000)  # a query whose clip is not in the base
    as_kind = {
        "tensor": torch.tensor,
        "list": list,
        "numpy": np.array,
        "strings": lambda numbers: [f"clip {number}" for number in numbers],
        "int32": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
    }[kind]
    base = make(ids=as_kind(ids.tolist()))
    audio, text = query()
    # The queries are nearest to rows of their own.
    audio[:6] = base.fine.audio[[0, 10, 20, 30, 40, 49]]
    text[:6] = base.fine.text[[0, 10, 20, 30, 40, 49]]
    found = base.lookup(audio, text, k, exclude_ids=as_kind(own))
    check(found["fine"], expected_neighborhood(base.fine, audio, text, k, np.array(own), ids.numpy()))
    check(found["coarse"], expected_neighborhood(base.coarse, audio, text, min(k, 12)))


def test_integers_of_every_kind_exclude_each_other():
    """A data loader turns numpy integers into tensors; the base was made from either."""
    audio, text = query(5)
    forms = [
        [3, 4, 5, 6, 7],
        np.arange(3, 8),
        torch.arange(3, 8),
        list(np.arange(3, 8)),
        list(torch.arange(3, 8)),
    ]
    for stored in (np.arange(50), list(np.arange(50)), torch.arange(50), range(50)):
        base = make(ids=stored)
        audio, text = base.fine.audio[3:8], base.fine.text[3:8]
        for form in forms:
            rows = base.lookup(audio, text, 10, exclude_ids=form)["fine"].audio_rows
            assert not bool((rows == torch.arange(3, 8)[:, None]).any())


@PROPERTY
@given(data=st.data())
def test_own_rows_are_left_out_whatever_the_ids(data):
    rows = data.draw(st.integers(2, 25))
    ids = data.draw(st.lists(st.integers(0, 6), min_size=rows, max_size=rows))
    left = rows - max(ids.count(one) for one in ids)
    if left == 0:
        ids[0], left = 7, 1
    k = data.draw(st.integers(1, left))
    audio, text = whole_numbers(rows, 2, 0, 1), whole_numbers(rows, 2, 1, 1)  # with many equal scores
    base = KnowledgeBase(StoredPairs(audio, text), StoredPairs(audio, text), torch.tensor(ids))
    own = np.array(data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4)))
    queries = whole_numbers(4, 2, 2, 1), whole_numbers(4, 2, 3, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_search, "_SCORES_PER_BLOCK", data.draw(st.sampled_from([1, 20, 1 << 20])))
        found = base.lookup(*queries, k, exclude_ids=torch.from_numpy(own))["fine"]
    check(found, expected_neighborhood(base.fine, *queries, k, own, np.array(ids)))


@pytest.mark.parametrize("k", [1, 5, len(RAGGED)])
@pytest.mark.parametrize("excluding", [False, True])
def test_one_row_of_each_clip(k, excluding):
    ids = ragged_ids()
    base, (audio, text) = make(ids=ids), query()
    own = ids[:7].numpy() if excluding else None
    k -= excluding and k == len(RAGGED)
    exclude_ids = None if own is None else torch.from_numpy(own)
    found = base.lookup(audio, text, k, exclude_ids=exclude_ids, distinct_clips=True)
    expected = expected_neighborhood(base.fine, audio, text, k, own, ids.numpy(), distinct=True)
    check(found["fine"], expected)
    check(found["coarse"], expected_neighborhood(base.coarse, audio, text, min(k, 12)))


def test_five_captions_of_a_clip_no_longer_fill_half_of_the_neighbors():
    audio = directions(20, 6)[torch.arange(100) // 5]
    base = KnowledgeBase.from_embeddings(
        audio, directions(100, 6, 1), ids=torch.arange(100) // 5, num_prototypes=4
    )
    queries = directions(8, 6, 2), directions(8, 6, 3)
    plain, distinct = (base.lookup(*queries, 10, distinct_clips=on)["fine"] for on in (False, True))
    assert [len(row.unique()) for row in base.ids[plain.audio_rows]] == [2] * 8
    for rows in (distinct.audio_rows, distinct.text_rows):
        assert [len(row.unique()) for row in base.ids[rows]] == [10] * 8


@PROPERTY
@given(data=st.data())
def test_one_row_of_each_clip_whatever_the_ids(data):
    rows = data.draw(st.integers(1, 25))
    ids = data.draw(st.lists(st.integers(0, 6), min_size=rows, max_size=rows))
    k = data.draw(st.integers(1, len(set(ids))))
    audio, text = whole_numbers(rows, 2, 0, 1), whole_numbers(rows, 2, 1, 1)  # with many equal scores
    base = KnowledgeBase(StoredPairs(audio, text), StoredPairs(audio, text), torch.tensor(ids))
    queries = whole_numbers(4, 2, 2, 1), whole_numbers(4, 2, 3, 1)
    found = base.lookup(*queries, k, distinct_clips=True, granularities=("fine",))["fine"]
    check(found, expected_neighborhood(base.fine, *queries, k, None, np.array(ids), distinct=True))


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat;nprobe=1", "HNSW16;efSearch=256"])
def test_one_row_of_each_clip_by_faiss(index):
    pytest.importorskip("faiss")
    base = make(200, ids=torch.arange(200) // 5, index=index, dtype=torch.float32)
    audio, text = query(dtype=torch.float32)
    found = base.lookup(audio, text, 8, exclude_ids=torch.arange(7), distinct_clips=True)["fine"]
    for rows in (found.audio_rows, found.text_rows):
        clips = base.ids[rows]
        assert [len(row.unique()) for row in clips] == [8] * 7
        assert not bool((clips == torch.arange(7)[:, None]).any())


def test_a_number_of_neighbors_for_each_granularity():
    base, (audio, text) = make(), query()
    found = base.lookup(audio, text, {"fine": 3, "coarse": 9})
    check(found["fine"], expected_neighborhood(base.fine, audio, text, 3))
    check(found["coarse"], expected_neighborhood(base.coarse, audio, text, 9))


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat;nprobe=1", "HNSW16;efSearch=64"])
def test_own_rows_are_left_out_by_faiss(index):
    pytest.importorskip("faiss")
    base = make(200, ids=torch.arange(200) // 5, index=index, dtype=torch.float32)
    own = torch.arange(0, 200, 29)
    found = base.lookup(base.fine.audio[own], base.fine.text[own], 60, exclude_ids=own // 5)["fine"]
    for rows in (found.audio_rows, found.text_rows):
        assert not bool((rows // 5 == own[:, None] // 5).any())
        assert all(len(set(row)) == 60 and min(row) >= 0 for row in rows.tolist())


@pytest.mark.parametrize("index", ["Flat", "IVF4,Flat;nprobe=4"])
def test_faiss_finds_what_exact_search_finds(index):
    pytest.importorskip("faiss")
    base, (audio, text) = make(300, index=index, dtype=torch.float32), query(dtype=torch.float32)
    exact = make(300, dtype=torch.float32)
    for name, found in base.lookup(audio, text, 8).items():
        for one, other in zip(tensors_in(found), tensors_in(exact.lookup(audio, text, 8)[name]), strict=True):
            assert torch.equal(one, other)


@PROPERTY
@given(seed=st.integers(0, 1000), excluding=st.booleans())
def test_permuting_the_base_renames_the_rows(seed, excluding):
    ids = torch.arange(40) // 3
    audio, text = directions(40, 5, 0, torch.float64), directions(40, 5, 1, torch.float64)
    order = torch.randperm(40, generator=generator(seed))
    queries, own = query(5, 5), ids[[0, 9, 20, 30, 39]] if excluding else None
    one = KnowledgeBase(StoredPairs(audio, text), StoredPairs(audio[:9], text[:9]), ids)
    shuffled = StoredPairs(audio[order], text[order])
    other = KnowledgeBase(shuffled, StoredPairs(audio[:9], text[:9]), ids[order])
    expected = one.lookup(*queries, 6, exclude_ids=own)["fine"]
    found = other.lookup(*queries, 6, exclude_ids=own)["fine"]
    assert torch.equal(order[found.audio_rows], expected.audio_rows)
    assert torch.equal(order[found.text_rows], expected.text_rows)
    for a, b in zip(tensors_in(found)[2:], tensors_in(expected)[2:], strict=True):
        assert torch.equal(a, b)


@PROPERTY
@given(seed=st.integers(0, 1000))
def test_permuting_the_queries_permutes_the_result(seed):
    base, (audio, text) = make(), query()
    order = torch.randperm(7, generator=generator(seed))
    expected = base.lookup(audio, text, 6)
    for name, found in base.lookup(audio[order], text[order], 6).items():
        for a, b in zip(tensors_in(found), tensors_in(expected[name]), strict=True):
            assert torch.equal(a, b[order])


def test_the_length_of_a_query_does_not_matter():
    base, (audio, text) = make(), query()
    expected = base.lookup(audio, text, 6)
    for name, found in base.lookup(4 * audio, 0.25 * text, 6).items():
        assert torch.equal(found.audio_rows, expected[name].audio_rows)
        assert torch.equal(found.text_rows, expected[name].text_rows)


@pytest.mark.parametrize("wanted", [["fine"], ["coarse"], ("coarse", "fine"), [], {"fine": 1}])
def test_only_the_granularities_asked_for(wanted):
    base, (audio, text) = make(), query()
    both = base.lookup(audio, text, 4)
    found = base.lookup(audio, text, 4, granularities=wanted)
    assert list(found) == list(wanted)
    for name, one in found.items():
        assert torch.equal(one.audio_rows, both[name].audio_rows)
    unwanted = {"fine", "coarse"} - set(wanted)
    fresh = make()
    fresh.lookup(audio, text, 4, granularities=wanted)
    assert not any("search_audio" in vars(getattr(fresh, name)) for name in unwanted)  # no index for nothing


def test_carries_no_gradient():
    base, (audio, text) = make(dtype=torch.float32), query(dtype=torch.float32)
    found = base.lookup(audio.requires_grad_(), text.requires_grad_(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found |= {f"{name}, autocast": hood for name, hood in base.lookup(audio, text, 4).items()}
    assert not any(tensor.requires_grad for hood in found.values() for tensor in tensors_in(hood))
    assert torch.is_grad_enabled()
    rows = [side.detach().requires_grad_() for side in (base.fine.audio, base.fine.text)]
    learnable = KnowledgeBase(StoredPairs(*rows), StoredPairs(*rows), base.ids).lookup(audio, text, 4)
    assert not any(tensor.requires_grad for hood in learnable.values() for tensor in tensors_in(hood))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_scores_are_not_rounded(dtype):
    base, (audio, text) = make(2000, dtype=dtype), query(dtype=dtype)
    expected = base.lookup(audio, text, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = base.lookup(audio, text, 10)
    for name, hood in found.items():
        for one, other in zip(tensors_in(hood), tensors_in(expected[name]), strict=True):
            assert torch.equal(one, other)
        assert hood.audio_by_text.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_in_the_precision_of_the_base(dtype):
    base, (audio, text) = make(dtype=torch.float32), query(dtype=dtype)
    for hood in base.lookup(audio, text, 4).values():
        assert {tensor.dtype for tensor in tensors_in(hood)[2:]} == {torch.float32}


def test_changing_a_result_does_not_change_the_base():
    base, (audio, text) = make(), query()
    before = base.fine.audio.clone()
    for hood in base.lookup(audio, text, 50).values():
        for tensor in tensors_in(hood)[2:]:
            tensor.zero_()
    assert torch.equal(base.fine.audio, before)


class TestRefused:
    @pytest.mark.parametrize("k", [0, -1, 51, 1000])
    def test_neighbors_out_of_range(self, k):
        message = (
            rf"Argument `k` has to be in \[1, 50\] for a .* of 50 pairs, but got {k}\..* `num_neighbors`"
        )
        with pytest.raises(ValueError, match=message):
            make().lookup(*query(), k)

    @pytest.mark.parametrize("k", [0, 45, 50])
    def test_neighbors_out_of_range_without_the_own_clip(self, k):
        message = rf"in \[1, 44\] for .* of 50 pairs without those of the own clip, but got {k}\."
        with pytest.raises(ValueError, match=message):
            make(ids=ragged_ids()).lookup(*query(), k, exclude_ids=range(7))

    @pytest.mark.parametrize("side", ["audio", "text"])
    def test_another_width(self, side):
        queries = dict(zip(("audio", "text"), query(), strict=True))
        queries[side] = torch.ones(7, 8)
        shapes = rf"audio \(7, {8 if side == 'audio' else 6}\) and text \(7, {8 if side == 'text' else 6}\)"
        message = rf"holds embeddings of width 6, but was asked with {shapes}\. Refresh it"
        with pytest.raises(ValueError, match=message):
            make().lookup(**queries, k=3)

    def test_another_device(self):
        audio, text = (side.to("meta") for side in query())
        message = (
            r'lies on cpu, but was asked from meta\. Move it once: `knowledge = knowledge\.to\("meta"\)`'
        )
        with pytest.raises(ValueError, match=message):
            make().lookup(audio, text, 3)

    @pytest.mark.parametrize("ids", [[1], [], list(range(6)), torch.arange(8)])
    def test_ids_of_another_number(self, ids):
        """One id would be broadcast to all queries, which hides another clip's rows from them."""
        message = r"`exclude_ids` has to hold one id for each of the 7 queries, but got \("
        with pytest.raises(ValueError, match=message):
            make().lookup(*query(), 3, exclude_ids=ids)

    @pytest.mark.parametrize("ids", [torch.zeros(7), [0.5] * 7, torch.zeros(7, 1, dtype=torch.int64)])
    def test_ids_that_are_no_identifiers(self, ids):
        with pytest.raises(ValueError, match=r"`exclude_ids` has to .* integers"):
            make().lookup(*query(), 3, exclude_ids=ids)


def test_a_base_without_prototypes(tmp_path):
    audio, text = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=0)
    base.save(tmp_path / "base.safetensors")
    for one in (base, KnowledgeBase.load(tmp_path / "base.safetensors")):
        assert len(one.coarse) == 0
        assert one.fingerprint == base.fingerprint
        assert list(one.lookup(audio, text, 2, granularities=("fine",))) == ["fine"]
        with pytest.raises(ValueError, match=r"built without prototypes.*needs_prototypes"):
            one.lookup(audio, text, 2)
