"""The queue of earlier batches: order, wrap-around, dtypes, state."""

import copy
import pickle

import pytest
import torch

from ask_lightning.losses.embedding_queue import EmbeddingQueue


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None].repeat(1, 3)


def content(queue: EmbeddingQueue) -> list[int]:
    return queue.column("audio", like=rows(0))[:, 0].int().tolist()


def test_first_in_first_out():
    queue = EmbeddingQueue(5)
    seen: list[int] = []
    for start in range(0, 40, 3):
        batch = list(range(start, start + 3))
        queue.push(audio=rows(*batch), ids=torch.tensor(batch))
        seen += batch
        assert content(queue) == seen[-5:]
        assert queue.column("ids", like=torch.tensor([0])).tolist() == seen[-5:]
        assert len(queue) == min(5, len(seen))
    assert queue.is_full


@pytest.mark.parametrize("size", [4, 5])
def test_a_batch_larger_than_the_queue(size):
    queue = EmbeddingQueue(size)
    queue.push(audio=rows(1, 2))
    queue.push(audio=rows(*range(10, 15)))
    assert content(queue) == list(range(10, 15))[-size:]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_entered_last_can_be_put_out_again(count):
    queue, before = EmbeddingQueue(5), []
    for start in range(0, 30, count):
        batch = list(range(start, start + count))
        queue.push(audio=rows(*batch), ids=torch.tensor(batch))
        queue.undo_push()
        assert content(queue) == before
        queue.push(audio=rows(*batch), ids=torch.tensor(batch))
        before = content(queue)
        assert before == queue.column("ids", like=torch.tensor([0])).tolist()
    queue.undo_push()
    once = content(queue)
    queue.undo_push()
    assert content(queue) == once != before


def test_rows_that_are_not_finite_enter_as_zeros():
    queue = EmbeddingQueue(4)
    broken = torch.tensor([[1.0, 2.0], [1.0, torch.nan], [torch.inf, 0.0]])
    queue.push(audio=broken, ids=torch.tensor([7, 8, 9]))
    stored = queue.column("audio", like=broken)
    assert stored.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert queue.column("ids", like=torch.tensor([0])).tolist() == [7, 8, 9]


def test_empty():
    queue = EmbeddingQueue(2)
    assert len(queue) == 0
    assert not queue.is_full
    assert queue.column("audio", like=rows(1, 2)).shape == (0, 3)


def test_rows_have_no_gradient_and_a_graph_survives_what_enters():
    queue = EmbeddingQueue(2)
    queue.push(audio=rows(1, 2).requires_grad_())
    query = rows(3).requires_grad_()
    stored = queue.column("audio", like=query)
    assert not stored.requires_grad
    score = (query @ stored.T).sum()
    queue.push(audio=rows(5, 6))
    score.backward()
    assert query.grad.tolist() == [[3.0, 3.0, 3.0]]


def test_dtype_is_that_of_the_rows_that_ask():
    queue = EmbeddingQueue(2)
    queue.push(audio=rows(1))
    assert queue.column("audio", like=rows(1).double()).dtype == torch.float64
    queue.push(audio=rows(2).double())
    assert queue.state_dict()["audio"].dtype == torch.float64
    assert content(queue) == [1, 2]


def test_state_of_a_larger_queue_gives_its_newest_rows():
    queue = EmbeddingQueue(4)
    queue.push(audio=rows(1, 2, 3, 4))
    smaller = EmbeddingQueue(3)
    smaller.load_state_dict(queue.state_dict())
    assert content(smaller) == [2, 3, 4]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda queue: pickle.loads(pickle.dumps(queue))])
def test_copies_are_independent(duplicate):
    queue = EmbeddingQueue(3)
    queue.push(audio=rows(1, 2))
    twin = duplicate(queue)
    twin.push(audio=rows(3, 4))
    assert (content(queue), content(twin)) == ([1, 2], [2, 3, 4])
    queue.clear()
    assert content(queue) == []


def test_other_rows_are_refused():
    queue = EmbeddingQueue(3)
    queue.push(audio=rows(1), ids=torch.tensor([1]))
    with pytest.raises(
        ValueError, match=r"holds rows of audio \(3,\), ids \(\), but a batch brings audio \(3,\)\."
    ):
        queue.push(audio=rows(1))
    with pytest.raises(ValueError, match=r"but a batch brings audio \(2,\), ids \(\)\..*a new run"):
        queue.push(audio=torch.ones(1, 2), ids=torch.tensor([1]))
    with pytest.raises(ValueError, match="`size` has to be an integer of at least 1, but got 0"):
        EmbeddingQueue(0)
