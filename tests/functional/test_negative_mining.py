"""The choice of hard negatives against a loop over the candidates."""

import pytest
import torch

from ask_lightning.functional.negative_mining import repeated, select_hard_negatives


def by_hand(scores, positive, excluded, k, threshold):
    """The candidates of one query that are chosen, and those that are filtered."""
    chosen, filtered = [], []
    for column, score in enumerate(scores.tolist()):
        if excluded[column]:
            continue
        if threshold is not None and score > threshold * positive:
            filtered.append(column)
        elif len(chosen) < k:
            chosen.append(column)
    return chosen, filtered


@pytest.mark.parametrize("threshold", [None, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_it_is_the_loop(threshold, k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(20, 12, generator=generator, dtype=torch.float64).sort(descending=True).values
    positives = torch.rand(20, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    excluded = torch.rand(20, 12, generator=generator) < 0.3
    columns, chosen, filtered = select_hard_negatives(scores, positives, excluded, k, threshold)
    assert columns.shape == chosen.shape == (20, k)
    for row in range(20):
        expected, left_out = by_hand(scores[row], positives[row].item(), excluded[row], k, threshold)
        assert columns[row][chosen[row]].tolist() == expected
        assert filtered[row].nonzero().flatten().tolist() == left_out


def test_none_remains():
    scores = torch.tensor([[0.9, 0.8]])
    _, chosen, filtered = select_hard_negatives(scores, torch.tensor([0.1]), torch.zeros(1, 2).bool(), 2)
    assert not chosen.any()
    assert filtered.all()


def test_repeated_ids():
    ids = torch.randint(5, (30, 9), generator=torch.Generator().manual_seed(0))
    expected = [[row[:column].count(clip) > 0 for column, clip in enumerate(row)] for row in ids.tolist()]
    assert repeated(ids).tolist() == expected
