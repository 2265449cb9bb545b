"""`ExactSearch` and `stable_topk` against a full sort by (-score, row)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ask_lightning.knowledge import exact_search
from ask_lightning.knowledge.exact_search import ExactSearch, FastestExactSearch, stable_topk
from ask_lightning.knowledge.search import build_search
from tests.helpers.operators import fake_gpu
from tests.helpers.vectors import directions, needs_gpu, sorted_search, whole_numbers

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def use_blocks(patch: pytest.MonkeyPatch, scores: int | None, queries: int | None) -> None:
    if scores is not None:
        patch.setattr(exact_search, "_SCORES_PER_BLOCK", scores)
    if queries is not None:
        patch.setattr(exact_search, "_QUERIES_PER_BLOCK", queries)


def check(vectors: torch.Tensor, queries: torch.Tensor, k: int) -> None:
    scores, rows = ExactSearch(vectors)(queries, k)
    expected_scores, expected_rows = sorted_search(vectors, queries, k)
    assert rows.dtype == torch.int64
    assert scores.dtype == vectors.dtype
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    np.testing.assert_array_equal(scores.double().numpy(), expected_scores)


# (None, None) are the constants as they are; at 1 score each block is as high as K; 40 and 100 make blocks of
# uneven height, the last of which may hold fewer rows than K.
@pytest.mark.parametrize("blocks", [(None, None), (1, 1), (1, 3), (40, 4), (100, None), (100, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "rows", "k"),
    [(1, 1, 1), (1, 97, 5), (9, 97, 1), (9, 97, 10), (9, 97, 96), (9, 97, 97), (16, 400, 30)],
)
@pytest.mark.parametrize("largest", [0, 1, 2])  # 0: all vectors are zero, every score ties
def test_agrees_with_a_full_sort(monkeypatch, largest, batch, rows, k, dtype, blocks):
    use_blocks(monkeypatch, *blocks)
    vectors, queries = whole_numbers(rows, 3, 0, largest, dtype), whole_numbers(batch, 3, 1, largest, dtype)
    check(vectors, queries, k)


@PROPERTY
@given(data=st.data())
def test_agrees_with_a_full_sort_whatever_the_blocks(data):
    rows, batch, width = (data.draw(st.integers(1, most)) for most in (40, 6, 3))
    number = st.sampled_from([-1.0, -0.0, 0.0, 1.0])
    draw = lambda length: torch.tensor(  # noqa: E731
        data.draw(
            st.lists(st.lists(number, min_size=width, max_size=width), min_size=length, max_size=length)
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, data.draw(st.integers(1, 60)), data.draw(st.integers(1, 8)))
        check(draw(rows), draw(batch), data.draw(st.integers(1, rows)))


@pytest.mark.parametrize("copies", [2, 5, 60])
@pytest.mark.parametrize("scores_per_block", [None, 1, 64])
def test_copies_of_a_row_are_found_in_order_across_the_kth_place_and_blocks(
    monkeypatch, copies, scores_per_block
):
    use_blocks(monkeypatch, scores_per_block, None)
    distinct = whole_numbers(12, 4, 3)
    vectors = distinct.repeat(copies, 1)  # copies lie 12 rows apart, in different blocks
    for k in (1, copies - 1, copies, copies + 1, 3 * copies - 1):
        check(vectors, whole_numbers(8, 4, 4), k)
    vectors = distinct.repeat_interleave(copies, 0)  # five captions of one clip: copies follow each other
    for k in (1, copies - 1, copies, copies + 1, 3 * copies - 1):
        check(vectors, whole_numbers(8, 4, 4), k)


def test_float64_is_searched_in_float64():
    vectors = directions(500, 6, 0, torch.float64)
    vectors[250:] = vectors[:250] * (1 - 1e-12)  # all but equal, which float32 cannot tell
    queries = directions(20, 6, 1, torch.float64)
    scores, rows = ExactSearch(vectors)(queries, 20)
    expected_scores, expected_rows = sorted_search(vectors, queries, 20)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=1e-14)


@pytest.mark.parametrize("scores_per_block", [None, 700])
def test_random_directions_in_float32(monkeypatch, scores_per_block):
    use_blocks(monkeypatch, scores_per_block, None)
    vectors, queries = directions(3000, 24, 0), directions(33, 24, 1)
    scores, rows = ExactSearch(vectors)(queries, 10)
    expected_scores, expected_rows = sorted_search(vectors, queries, 10)
    np.testing.assert_array_equal(rows.numpy(), expected_rows)
    np.testing.assert_allclose(scores.numpy(), expected_scores, atol=1e-6)


def test_blocks_change_no_bit_for_whole_numbers(monkeypatch):
    vectors, queries = whole_numbers(700, 8, 0), whole_numbers(50, 8, 1)
    undivided = ExactSearch(vectors)(queries, 25)
    for scores_per_block, queries_per_block in [(1, 1), (1000, 50), (5000, 7), (20_000, 49)]:
        use_blocks(monkeypatch, scores_per_block, queries_per_block)
        for found, expected in zip(ExactSearch(vectors)(queries, 25), undivided, strict=True):
            assert torch.equal(found, expected)


def test_signed_zeros_are_equal_scores():
    vectors = torch.tensor([[0.0, 0.0], [-0.0, -0.0], [0.0, 1.0], [-0.0, -1.0], [-1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [-1.0, -0.0], [0.0, 0.0], [-0.0, -0.0]])
    for k in range(1, 6):
        check(vectors, queries, k)
    assert stable_topk(torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]]), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_queries_of_another_precision_are_scored_in_that_of_the_vectors(dtype):
    vectors, queries = directions(100, 8, 0), directions(5, 8, 1, dtype)
    found = ExactSearch(vectors)(queries, 4)
    for one, other in zip(found, ExactSearch(vectors)(queries.float(), 4), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_no_queries_find_nothing():
    scores, rows = ExactSearch(whole_numbers(10, 3))(torch.empty(0, 3), 4)
    assert scores.shape == rows.shape == (0, 4)


class LargestNewTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that is computed, views of `known` tensors aside."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(("batch", "rows"), [(1, 200_000), (3, 200_000), (64, 200_000), (1100, 20_000)])
def test_memory_is_bounded_by_a_block_of_scores(batch, rows, tie):
    vectors, queries = directions(rows, 8, 0), directions(batch, 8, 1)
    if tie:
        vectors[rows // 2 :] = vectors[: rows // 2]
    with LargestNewTensor(vectors, queries) as memory:
        ExactSearch(vectors)(queries, 10)
    assert 100_000 < memory.elements <= exact_search._SCORES_PER_BLOCK


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.bfloat16, 8), (torch.float32, 1)])
def test_a_gpu_converts_no_more_than_half_a_gigabyte_at_a_time(monkeypatch, dtype, blocks):
    sizes = []

    def products(vectors, queries):
        sizes.append(vectors.numel())
        return vectors.new_empty(len(vectors), len(queries), dtype=queries.dtype)

    monkeypatch.setattr(exact_search, "products", products)
    with fake_gpu():
        vectors = torch.empty(1 << 20, 1024, dtype=dtype, device="cuda")
        ExactSearch(vectors)(torch.empty(32, 1024, device="cuda"), 10)
    assert sizes == [vectors.numel() // blocks] * blocks


class OnGPU(torch.Tensor):
    """Claims to be on a GPU; asking it for a truth value, which would wait for the device, is an error."""

    is_cuda = True

    def __bool__(self) -> bool:
        raise AssertionError("host synchronisation")


@PROPERTY
@given(data=st.data())
def test_first_largest_with_and_without_the_check_for_ties(data):
    width, batch = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    number = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0])
    row = st.lists(number, min_size=width, max_size=width)
    scores = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    k = data.draw(st.integers(1, width))
    expected = [sorted(sorted(range(width), key=lambda j: (-row[j], j))[:k]) for row in scores.tolist()]
    assert stable_topk(scores, k).tolist() == expected
    assert stable_topk(scores.as_subclass(OnGPU), k).tolist() == expected


def test_a_tie_in_one_row_does_not_disturb_the_others():
    untied = torch.rand(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tied = torch.ones(1, 50, dtype=torch.float64)
    together = stable_topk(torch.cat([untied, tied, -untied]), 7)
    assert torch.equal(together[:20], stable_topk(untied, 7))
    assert torch.equal(together[20], torch.arange(7))
    assert torch.equal(together[21:], stable_topk(-untied, 7))


def test_exact_and_auto_on_a_cpu_search_without_a_copy():
    vectors = whole_numbers(10, 3)
    for index, kind in (("exact", ExactSearch), ("auto", FastestExactSearch)):
        built = build_search(vectors, index)
        assert isinstance(built, kind)
        assert built.vectors is vectors


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("blocks", [(None, None), (40, 4)])
def test_a_gpu_finds_the_same(monkeypatch, blocks, device):
    use_blocks(monkeypatch, *blocks)
    vectors, queries = whole_numbers(700, 4, 0), whole_numbers(20, 4, 1)
    found = ExactSearch(vectors.to(device))(queries.to(device), 33)
    for one, other in zip(found, ExactSearch(vectors)(queries, 33), strict=True):
        assert one.device.type == "cuda"
        assert torch.equal(one.cpu(), other)


def scores_by_row(rows, queries):
    scores, found = ExactSearch(rows)(queries, len(rows))
    return torch.empty_like(scores).scatter_(1, found, scores)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 32])
@pytest.mark.parametrize(("count", "width"), [(101, 16), (101, 1024), (2563, 512)])
def test_the_score_of_a_row_does_not_depend_on_where_it_stands(num_queries, count, width):
    rows, queries = directions(count, width, seed=1), directions(num_queries, width, seed=2)
    whole = scores_by_row(rows, queries)
    for first in range(3):
        assert torch.equal(scores_by_row(rows[first::3], queries), whole[:, first::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [6, 8, 33, 50])
@pytest.mark.parametrize("count", [3, 7, 17, 100])
def test_copies_of_a_row_have_equal_scores_in_any_width(count, width, dtype):
    rows = directions(count, width, seed=1, dtype=dtype)
    rows[::2] = rows[0]
    for num_queries in (1, 2, 5, 31):
        queries = directions(num_queries, width, seed=2, dtype=dtype)
        scores = scores_by_row(rows, queries)
        copies = scores[:, ::2]
        assert torch.equal(copies, copies[:, :1].expand_as(copies))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("rest", [1, 2, 3])
def test_copies_of_a_row_tie_where_the_last_block_is_low(monkeypatch, rest, dtype):
    use_blocks(monkeypatch, 8 * 31, None)
    rows = directions(1, 24, seed=1, dtype=dtype).expand(2 * 8 + rest, -1).contiguous()
    for k in (1, 5, len(rows)):
        _, found = ExactSearch(rows)(directions(31, 24, seed=2), k)
        assert torch.equal(found, torch.arange(k).expand(31, -1))
