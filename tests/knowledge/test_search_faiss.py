"""`FaissSearch`: what it finds, and what it refuses."""

import numpy as np
import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase, faiss_search
from ask_lightning.knowledge.exact_search import ExactSearch
from ask_lightning.knowledge.faiss_search import FaissSearch
from ask_lightning.knowledge.search import build_search
from tests.helpers.vectors import directions, needs_gpu, sorted_search, whole_numbers

faiss = pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def vectors():
    return directions(2000, 16, 0)


@pytest.fixture(scope="module")
def queries():
    return directions(40, 16, 1)


@pytest.mark.parametrize("k", [1, 10, 2000])
@pytest.mark.parametrize("index", ["Flat", "Flat;", "IVF32,Flat;nprobe=32", "IVF32,Flat;nprobe=1000"])
def test_exhaustive_indexes_equal_exact_search(vectors, queries, index, k):
    found = build_search(vectors, index)
    assert isinstance(found, FaissSearch)
    scores, rows = found(queries, k)
    expected_scores, expected_rows = sorted_search(vectors, queries, k)
    assert rows.dtype == torch.int64
    np.testing.assert_allclose(scores.numpy(), expected_scores, atol=1e-6)
    # Scores closer than a float32 rounding may swap places; the rows are the same but for those.
    swapped = rows.numpy() != expected_rows
    own_scores = (queries.double() @ vectors.double().T).gather(1, rows).numpy()
    np.testing.assert_allclose(own_scores, expected_scores, atol=1e-6)
    assert swapped.mean() < 0.01
    assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.parametrize("index", ["Flat", "IVF8,Flat;nprobe=8"])
def test_equal_scores_are_ordered_by_row(index):
    vectors, queries = whole_numbers(300, 3, 0), whole_numbers(30, 3, 1)
    for k in (300, 40):
        scores, rows = FaissSearch(vectors, index)(queries, k)
        expected_scores, expected_rows = sorted_search(vectors, queries, k)
        np.testing.assert_array_equal(scores.numpy(), expected_scores)
        assert torch.equal((queries @ vectors.T).gather(1, rows), scores)
        assert all(len(set(row)) == k for row in rows.tolist())
        tied = scores[:, 1:] == scores[:, :-1]
        assert bool(tied.any())
        assert bool((rows[:, 1:] > rows[:, :-1])[tied].all())
        # Which of the rows that tie for the last place are found is Faiss's choice.
        sure = expected_scores > expected_scores[:, -1:]
        np.testing.assert_array_equal(rows.numpy()[sure], expected_rows[sure])
    np.testing.assert_array_equal(
        FaissSearch(vectors, index)(queries, 300)[1].numpy(), sorted_search(vectors, queries, 300)[1]
    )


@pytest.mark.parametrize("index", ["IVF64,Flat;nprobe=1", "IVF64,Flat", "PCA4,IVF64,Flat;nprobe=1"])
def test_short_lists_are_completed_by_exact_search(vectors, queries, index):
    k = 300  # far more than the rows in the lists that are visited
    raw = FaissSearch(vectors, index)._index.search(queries.numpy(), k)[1]
    incomplete = (raw < 0).any(axis=1)
    assert incomplete.any()
    scores, rows = FaissSearch(vectors, index)(queries, k)
    expected_scores, expected_rows = (x.numpy() for x in ExactSearch(vectors)(queries, k))
    np.testing.assert_array_equal(rows.numpy()[incomplete], expected_rows[incomplete])
    np.testing.assert_allclose(scores.numpy()[incomplete], expected_scores[incomplete], atol=1e-6)
    assert bool((rows >= 0).all())
    assert all(len(set(row)) == k for row in rows.tolist())


def test_default_share_of_visited_lists(vectors, queries):
    """A sixteenth: fewer right than when all are visited, more than when one is."""
    _, exact = ExactSearch(vectors)(queries, 10)

    def recall(index: str) -> float:
        _, rows = FaissSearch(vectors, index)(queries, 10)
        return np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows.tolist(), exact.tolist(), strict=True)])

    assert recall("IVF64,Flat") == recall("IVF64,Flat;nprobe=4")
    assert recall("IVF64,Flat;nprobe=1") < recall("IVF64,Flat") < recall("IVF64,Flat;nprobe=64") == 1
    assert FaissSearch(vectors[:300], "IVF4,Flat")._index.nprobe == 1


@pytest.mark.parametrize("index", ["HNSW32", "HNSW32;efSearch=128"])
def test_hnsw_recall(vectors, queries, index):
    scores, rows = FaissSearch(vectors, index)(queries, 10)
    _, exact = ExactSearch(vectors)(queries, 10)
    found = sum(len({*a} & {*b}) for a, b in zip(rows.tolist(), exact.tolist(), strict=True))
    assert found >= 0.9 * exact.numel()
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())
    torch.testing.assert_close(scores, (queries @ vectors.T).gather(1, rows), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("index", "reason"), [("LSH", "METRIC_L2"), ("PQ3", "multiple of")])
def test_a_string_that_does_not_suit_says_why(vectors, index, reason):
    with pytest.raises(ValueError, match=f"compared by inner products, Faiss says: .*{reason}"):
        build_search(vectors, index)


def test_float64_and_discontiguous_tensors():
    vectors, queries = directions(200, 6, 0, torch.float64), directions(9, 6, 1, torch.float64)
    _, rows = FaissSearch(vectors.T.contiguous().T, "Flat")(queries.T.contiguous().T, 5)
    np.testing.assert_array_equal(rows.numpy(), sorted_search(vectors, queries, 5)[1])


@pytest.mark.parametrize("index", ["nonsense", "", "exakt", "exact;nprobe=3", "PQ3"])
def test_a_string_that_faiss_does_not_know(vectors, index):
    factory = index.partition(";")[0]
    with pytest.raises(ValueError, match=rf'`index` has to be "auto", "exact" or .* but got {factory!r}\.'):
        build_search(vectors, index)


@pytest.mark.parametrize(
    ("index", "parameters"),
    [
        ("Flat;nprobe=2", "nprobe=2"),
        ("IVF4,Flat;efSearch=2", "efSearch=2"),
        ("HNSW8;efSearch=x", "efSearch=x"),
    ],
)
def test_a_parameter_that_the_index_has_not(vectors, index, parameters):
    with pytest.raises(ValueError, match=f"search parameters that its kind .* but got '{parameters}'"):
        build_search(vectors, index)


@pytest.mark.parametrize("index", ["IVF64,Flat", "IVF4,PQ2"])
def test_too_few_rows_to_train(index):
    with pytest.raises(ValueError, match=f"has to suit 20 rows, but got '{index}'.*training points"):
        build_search(directions(20, 4), index)


@pytest.mark.parametrize("index", ["IVF4,Flat;nprobe=0", "IVF4,Flat;nprobe=-3", "IVF0,Flat", "IDMap,Flat"])
def test_what_cannot_be_searched_is_refused_when_built(index):
    with pytest.raises(ValueError, match=f"has to suit 200 rows, but got '{index}', which Faiss cannot"):
        build_search(directions(200, 4), index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("nonsense", "Faiss factory string"),
        ("IVF64,Flat", "has to suit 20 rows"),
        ("IVF4,Flat;nprobe=0", "has to suit 20 rows"),
        ("Flat;nprobe=2", "search parameters"),
    ],
)
def test_a_base_with_such_an_index_fails_when_made(index, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeBase.from_embeddings(
            directions(20, 4, 0), directions(20, 4, 1), num_prototypes=3, index=index
        )


@pytest.mark.parametrize(
    "index", ["IVF8,Flat;nprobe=8", "IVF8,PQ4x4fs;nprobe=8", "PQ4x4", "OPQ4,IVF8,PQ4x4", "IVF8_HNSW8,Flat"]
)
class TestLearnt:
    """What an index has learnt is used again as long as it describes the rows."""

    def test_by_rows_that_moved_a_little(self, vectors, queries, index, monkeypatch):
        first = FaissSearch(vectors, index)
        moved = torch.nn.functional.normalize(vectors + 0.01 * directions(2000, 16, 5), dim=1)
        monkeypatch.setattr(faiss_search, "train", lambda *_: pytest.fail("learns again"))
        second = FaissSearch(moved, index, first.trained)
        assert second.trained is first.trained
        assert second._index.ntotal == first._index.ntotal == 2000
        if index.endswith("nprobe=8") and "Flat" in index:
            np.testing.assert_array_equal(second(queries, 5)[1], sorted_search(moved, queries, 5)[1])

    def test_not_by_rows_that_it_describes_badly(self, vectors, index):
        near = torch.nn.functional.normalize(vectors[:1] + 0.1 * vectors, dim=1)
        first = FaissSearch(near, index)
        second = FaissSearch(vectors, index, first.trained)
        assert second.trained is not first.trained
        before, now = (faiss_search.quantization_errors(one._index, vectors) for one in (first, second))
        assert now[0] < 0.9 * before[0]

    def test_not_by_an_index_of_another_kind_or_width(self, vectors, index):
        learnt = FaissSearch(vectors, index).trained
        assert learnt is not None
        assert not learnt.suits("IVF4,Flat", vectors)
        assert not learnt.suits(learnt.factory, vectors[:, :8])


def test_the_errors_are_mean_squared_distances(vectors):
    found = FaissSearch(vectors, "IVF8,PQ4")
    inner = faiss.extract_index_ivf(found._index)
    centroids = torch.from_numpy(inner.quantizer.reconstruct_n(0, 8)).double()
    nearest = (vectors.double() @ centroids.T).argmax(dim=1)
    expected = (vectors.double() - centroids[nearest]).square().sum(dim=1).mean()
    to_list, to_code = faiss_search.quantization_errors(found._index, vectors)
    assert to_list == pytest.approx(float(expected), rel=1e-5)
    assert 0 < to_code < to_list


def test_a_base_hands_on_what_its_indexes_have_learnt():
    settings = {"num_prototypes": 3, "index": "IVF4,Flat"}
    first = KnowledgeBase.from_embeddings(directions(300, 8, 0), directions(300, 8, 1), **settings)
    second = KnowledgeBase.from_embeddings(
        directions(300, 8, 0), directions(300, 8, 2), previous=first, **settings
    )
    assert second.fine.search_audio.trained is first.fine.search_audio.trained
    assert first.fine.search_audio.trained is not None
    third = KnowledgeBase.from_embeddings(
        directions(300, 8, 0), directions(300, 8, 2), previous=second.to("cpu"), **settings
    )
    assert third.fine.search_text.trained is second.fine.search_text.trained


@pytest.mark.parametrize("storage", ["float32", "memmap"])
def test_a_snapshot_keeps_what_indexes_have_learnt(tmp_path, storage):
    """Otherwise a resumed run would learn anew and find other neighbours."""
    options = {"directory": tmp_path / "rows"} if storage == "memmap" else {}
    settings = {"num_prototypes": 3, "index": "IVF16,Flat;nprobe=1", "storage": storage, **options}
    first = KnowledgeBase.from_embeddings(directions(900, 8, 0), directions(900, 8, 1), **settings)
    base = KnowledgeBase.from_embeddings(
        directions(900, 8, 5), directions(900, 8, 6), previous=first, **settings
    )
    base.save(tmp_path / "base.safetensors")
    loaded = KnowledgeBase.load(tmp_path / "base.safetensors")
    queries = directions(40, 8, 7)
    assert loaded.fingerprint == base.fingerprint
    assert torch.equal(loaded.fine.search_audio(queries, 5)[1], base.fine.search_audio(queries, 5)[1])
    own, kept = base.fine.search_audio.trained, loaded.fine.search_audio.trained
    assert own is first.fine.search_audio.trained
    assert (kept.factory, kept.errors) == (own.factory, own.errors)
    anew = KnowledgeBase.from_embeddings(directions(900, 8, 5), directions(900, 8, 6), **settings)
    assert not torch.equal(anew.fine.search_audio(queries, 5)[1], base.fine.search_audio(queries, 5)[1])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
class TestGPU:
    @pytest.mark.parametrize("index", ["auto", "Flat", "IVF32,Flat;nprobe=32", "HNSW32;efSearch=256"])
    def test_finds_what_exact_search_finds(self, vectors, queries, index, device):
        scores, rows = build_search(vectors.to(device), index)(queries.to(device), 10)
        assert rows.device.type == scores.device.type == "cuda"
        _, exact = ExactSearch(vectors)(queries, 10)
        found = sum(len({*a} & {*b}) for a, b in zip(rows.tolist(), exact.tolist(), strict=True))
        assert found >= (0.9 if "HNSW" in index else 0.999) * exact.numel()

    def test_short_lists_are_completed(self, vectors, queries, device):
        _, rows = FaissSearch(vectors.to(device), "IVF64,Flat;nprobe=1")(queries.to(device), 300)
        assert bool((rows >= 0).all())
        assert all(len(set(row)) == 300 for row in rows.tolist())


@pytest.mark.parametrize(
    "index", ["Flat", "IVF8,Flat;nprobe=3", "IVF8,SQ8;nprobe=8", "HNSW16,SQ8;efSearch=64"]
)
def test_an_index_in_a_file_finds_the_same(vectors, queries, index, tmp_path):
    taken = []
    built = FaissSearch(vectors, index, advance=taken.append)
    assert sum(taken) == len(vectors)
    built.save(tmp_path / "index")
    loaded = FaissSearch.load(tmp_path / "index", vectors, index)
    for one, two in zip(built(queries, 20), loaded(queries, 20), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(OSError, match="an index of 2000 rows of width 16"):
        FaissSearch.load(tmp_path / "index", vectors[:-1], index)
    with pytest.raises(OSError, match="cannot be read"):
        FaissSearch.load(tmp_path / "none", vectors, index)
    with pytest.raises(OSError, match="cannot be written"):
        built.save(tmp_path / "no folder" / "index")


def test_rows_in_half_precision_and_in_blocks(vectors, queries, monkeypatch):
    monkeypatch.setattr("ask_lightning.knowledge.faiss_search._ROWS_PER_ADDITION", 300)
    monkeypatch.setattr("ask_lightning.knowledge.faiss_search._TRAINING_ROWS", 1000)
    half = vectors.half()
    found = FaissSearch(half, "IVF8,Flat;nprobe=8")(queries, 10)
    expected_scores, expected_rows = sorted_search(half.float(), queries, 10)
    np.testing.assert_allclose(found[0].numpy(), expected_scores, atol=1e-6)
    assert (found[1].numpy() == expected_rows).mean() > 0.99
