"""`disagreement` and `modulation_factor`, Eq. 16–19."""

import math

import pytest
import torch

from ask_lightning.functional import disagreement, modulation_factor, reliability_potential


def test_disagreement_of_unit_vectors_lies_between_minus_one_and_one():
    one = torch.tensor([[1.0, 0.0]])
    for sign in (1, -1):
        potential = reliability_potential(one, sign * one[None], one[None])
        assert disagreement(potential).item() == pytest.approx(-sign)


def test_factor_is_one_plus_the_weighted_sum():
    fine, coarse = torch.tensor([1.0, math.e, 0.5]), torch.tensor([2.0, 1.0, 1.0 / math.e])
    factor = modulation_factor([(0.2, disagreement(fine)), (0.3, disagreement(coarse))])
    expected = [
        1 - 0.2 * math.log(psi) - 0.3 * math.log(other)
        for psi, other in zip(fine.tolist(), coarse.tolist(), strict=True)
    ]
    assert factor.tolist() == pytest.approx(expected)


def test_factor_of_one_granularity_and_of_a_mean():
    mean = disagreement(torch.tensor([1.0, math.e])).mean()
    assert modulation_factor([(0.4, mean)]).item() == pytest.approx(0.8)


def test_gradient_flows_through_every_granularity():
    fine, coarse = (torch.ones(3, requires_grad=True) for _ in range(2))
    modulation_factor([(0.2, disagreement(fine)), (0.3, disagreement(coarse))]).sum().backward()
    assert fine.grad.tolist() == pytest.approx([-0.2] * 3)
    assert coarse.grad.tolist() == pytest.approx([-0.3] * 3)
