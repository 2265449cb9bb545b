"""`index="auto"` on a CPU: two kernels, one result."""

import pytest
import torch

from ask_lightning.functional import unit_length
from ask_lightning.knowledge.exact_search import ExactSearch, FastestExactSearch
from ask_lightning.knowledge.search import build_search
from tests.helpers.vectors import faiss_as


def whole_numbers(*shape, seed=0):
    """Vectors whose inner products are exact in float32, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()


@pytest.mark.parametrize("batch", [1, 127, 128, 300])
@pytest.mark.parametrize("k", [1, 10, 499, 500])
def test_same_rows_as_exact_search_with_ties_everywhere(batch, k):
    vectors, queries = whole_numbers(500, 4), whole_numbers(batch, 4, seed=1)
    expected_scores, expected_rows = ExactSearch(vectors)(queries, k)
    scores, rows = build_search(vectors, "auto")(queries, k)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(scores, expected_scores)


def test_large_batches_go_to_faiss_and_small_ones_do_not(monkeypatch):
    import faiss

    calls = []
    knn = faiss.knn
    monkeypatch.setattr(
        faiss, "knn", lambda *args, **named: calls.append(len(args[0])) or knn(*args, **named)
    )
    find = FastestExactSearch(whole_numbers(300, 8))
    for batch in (2, 127, 128, 256):
        find(whole_numbers(batch, 8, seed=2), 5)
    assert calls == [128, 256]


def test_without_faiss_torch_does_all():
    with faiss_as(None):
        assert isinstance(build_search(whole_numbers(300, 8), "auto"), ExactSearch)


def test_other_types_stay_with_torch():
    assert isinstance(build_search(whole_numbers(300, 8).double(), "auto"), ExactSearch)


@pytest.mark.parametrize("width", [30, 512, 1024])
def test_copies_of_a_row_are_found_in_order(width):
    """Faiss rounds by where a row stands: the five rows of a clip have not quite the same score."""
    generator = torch.Generator().manual_seed(0)
    clips = unit_length(torch.randn(200, width, generator=generator))
    clip_of = torch.arange(1000) % 200
    vectors = clips[clip_of].contiguous()
    queries = unit_length(torch.randn(256, width, generator=generator))
    order = (queries.double() @ clips.double().T)[:, clip_of].argsort(dim=1, descending=True, stable=True)
    for k in (3, 10):
        scores, rows = FastestExactSearch(vectors)(queries, k)
        assert torch.equal(rows, order[:, :k])
        torch.testing.assert_close(scores, (queries[:, None] * vectors[rows]).sum(dim=2))
