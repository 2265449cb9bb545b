"""Weights of negatives: their mean, their order, their limits."""

import pytest
import torch

from ask_lightning.functional.hard_negatives import hard_negative_nt_xent, negative_weights

SIZE = 6


@pytest.fixture
def similarity():
    return torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("hardness", [0.0, 0.3, 4.0])
def test_they_have_a_mean_of_1_and_the_order_of_similarity(similarity, hardness):
    left_out = torch.eye(SIZE, dtype=torch.bool)
    left_out[0, 3] = left_out[3, 0] = True
    weights = negative_weights(similarity, 0.2, hardness, left_out)
    assert (weights[left_out] == 0).all()
    torch.testing.assert_close(weights.sum(dim=1), (~left_out).sum(dim=1).double())
    for row in range(SIZE):
        inside = ~left_out[row]
        order = similarity[row, inside].argsort()
        assert (weights[row, inside][order].diff() >= 0).all()


def test_the_loss_is_nt_xent_of_the_weighted_exponentials(similarity):
    left_out = torch.eye(SIZE, dtype=torch.bool)
    weights = negative_weights(similarity, 0.2, 0.5, left_out)
    exponentials = (similarity / 0.2).exp()
    pairs = exponentials.diagonal()
    expected = -(pairs / (pairs + (weights * exponentials).sum(dim=1))).log()
    torch.testing.assert_close(hard_negative_nt_xent(similarity, 0.2, hardness=0.5), expected)


def test_a_row_without_negatives_counts_nothing():
    everything = torch.ones(2, 2, dtype=torch.bool)
    losses = hard_negative_nt_xent(torch.zeros(2, 2), ignore=everything, hardness=0.0, positive_weight=0.0)
    assert torch.equal(losses, torch.zeros(2))
    assert torch.equal(negative_weights(torch.zeros(2, 2), 1.0, 1.0, everything), torch.zeros(2, 2))
