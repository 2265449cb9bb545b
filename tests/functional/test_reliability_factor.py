"""`disagreement`, `reliability_penalty`, `reliability_term` and `modulation_factor`, Eq. 16–19 and 21."""

import math

import pytest
import torch

from ask_lightning.functional import (
    disagreement,
    modulation_factor,
    reliability_penalty,
    reliability_potential,
    reliability_term,
)


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


def test_each_form_has_its_sign():
    potential = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for form, sign in (
        ("disagreement_factor", -1),
        ("disagreement_term", -1),
        ("agreement_factor", 1),
        ("agreement_term", 1),
    ):
        expected = [sign * math.log(psi) for psi in (0.5, 1.0, 2.0)]
        assert reliability_penalty(potential, form).tolist() == pytest.approx(expected, abs=1e-15)


def test_term_is_the_factor_without_one():
    weighted = [(0.2, torch.tensor([0.5, -1.0])), (1.5, torch.tensor([1.0, 0.25]))]
    assert reliability_term(weighted).tolist() == pytest.approx([1.6, 0.175])
    assert modulation_factor(weighted).tolist() == pytest.approx([2.6, 1.175])
