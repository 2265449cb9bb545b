"""Biases, hubs and the gate against numpy, and what they do to hubs."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from ask_lightning.functional.calibration import (
    Calibration,
    calibrate_scores,
    find_hubs,
    hub_bias,
    hub_biases,
)

KINDS = [Calibration("inverted_softmax"), Calibration("nearest_neighbors", num_neighbors=5, weight=0.5)]


def unit(rows: int, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1
    )


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_inverted_softmax(temperature):
    gallery, bank = unit(9, 0), unit(31, 1)
    scores = (bank @ gallery.T).numpy() / temperature
    expected = temperature * (logsumexp(scores, axis=0) - np.log(31))
    found = hub_bias(gallery, bank, Calibration(temperature=temperature))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 5, 31, 100])
def test_nearest_neighbors(count):
    gallery, bank = unit(9, 0), unit(31, 1)
    expected = 0.5 * np.sort((bank @ gallery.T).numpy(), axis=0)[::-1][:count].mean(axis=0)
    found = hub_bias(gallery, bank, Calibration("nearest_neighbors", num_neighbors=count, weight=0.5))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_blocks_change_nothing(rows, monkeypatch):
    gallery, bank = unit(9, 0), unit(31, 1)
    biases, hubs = hub_biases(gallery, bank, KINDS), find_hubs(gallery, bank, 2)
    torch.testing.assert_close(biases[1], hub_bias(gallery, bank, KINDS[1]))
    monkeypatch.setattr("ask_lightning.functional.calibration._SCORES_PER_BLOCK", 31 * rows)
    torch.testing.assert_close(hub_biases(gallery, bank, KINDS), biases)
    assert torch.equal(find_hubs(gallery, bank, 2), hubs)


@pytest.mark.parametrize("top_k", [1, 3, 9, 20])
def test_hubs_are_the_best_hits_of_the_bank(top_k):
    gallery, bank = unit(9, 0), unit(4, 1)
    order = np.argsort(-(bank @ gallery.T).numpy(), axis=1)
    expected = np.isin(np.arange(9), order[:, :top_k])
    assert find_hubs(gallery, bank, top_k).tolist() == expected.tolist()


def test_hubs_that_tie_are_hubs_together():
    gallery = torch.eye(3)[[0, 0, 1]]
    assert find_hubs(gallery, torch.eye(3)[:1]).tolist() == [True, True, False]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_gate_lets_only_queries_through_whose_best_hit_is_a_hub(kind):
    gallery, bank, queries = unit(30, 0), unit(8, 1), unit(40, 2)
    bias, hubs = hub_bias(gallery, bank, kind), find_hubs(gallery, bank)
    scores = queries @ gallery.T
    expected, gated = scores.numpy().copy(), 0
    for row in expected:
        if hubs[row.argmax()]:
            row -= bias.numpy()
            gated += 1
    assert 0 < gated < 40
    found = calibrate_scores(scores, bias, hubs)
    np.testing.assert_array_equal(found.numpy(), expected)
    # Each query stands alone.
    for number in range(40):
        assert torch.equal(calibrate_scores(scores[number : number + 1], bias, hubs)[0], found[number])
    np.testing.assert_array_equal(calibrate_scores(scores, bias).numpy(), (scores - bias).numpy())


def test_a_best_hit_that_ties_with_a_hub_is_one():
    scores = torch.tensor([[0.5, 0.5, 0.1]])
    for hubs in ([True, False, False], [False, True, False]):
        found = calibrate_scores(scores, torch.ones(3), torch.tensor(hubs))
        assert torch.equal(found, scores - 1)
    assert torch.equal(calibrate_scores(scores, torch.ones(3), torch.tensor([False, False, True])), scores)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_order_of_the_bank_changes_nothing(kind):
    gallery, bank = unit(9, 0), unit(31, 1)
    shuffled = bank[torch.randperm(31, generator=torch.Generator().manual_seed(3))]
    torch.testing.assert_close(hub_bias(gallery, shuffled, kind), hub_bias(gallery, bank, kind))
    assert torch.equal(find_hubs(gallery, shuffled), find_hubs(gallery, bank))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_bank_that_is_equally_near_to_all_changes_no_ranking(kind):
    """Copies of one query, orthogonal to the gallery or at one angle to all of it."""
    items = torch.cat([unit(9, 0), 0.7 * torch.ones(9, 1, dtype=torch.float64)], dim=1)
    gallery = torch.nn.functional.normalize(items, dim=1)
    for height in (0.0, 1.0):
        bank = torch.zeros(20, 7, dtype=torch.float64)
        bank[:, 6] = height
        bias = hub_bias(gallery, bank, kind)
        torch.testing.assert_close(bias, bias[:1].expand(9))
        scores = unit(5, 4, width=7) @ gallery.T
        assert torch.equal(calibrate_scores(scores, bias).argsort(dim=1), scores.argsort(dim=1))


def test_a_bank_that_holds_each_query_twice_is_the_same_bank():
    gallery, bank = unit(9, 0), unit(31, 1)
    twice = torch.cat([bank, bank])
    torch.testing.assert_close(hub_bias(gallery, twice), hub_bias(gallery, bank))
    once, double = (Calibration("nearest_neighbors", num_neighbors=count) for count in (5, 10))
    torch.testing.assert_close(hub_bias(gallery, twice, double), hub_bias(gallery, bank, once))


@pytest.mark.parametrize(
    "calibration", [Calibration(), Calibration("nearest_neighbors", num_neighbors=3, weight=1.0)], ids=str
)
@pytest.mark.parametrize("gated", [False, True])
def test_a_hub_loses_the_queries_that_are_not_its_own(calibration, gated):
    """All queries share a direction, and one item lies in it."""
    common = torch.zeros(8, dtype=torch.float64)
    common[0] = 1
    items = torch.eye(8, dtype=torch.float64)[1:]
    gallery = torch.nn.functional.normalize(
        torch.cat([common[None] + 0.1 * items[:1], items + 0.5 * common]), dim=1
    )
    queries = torch.nn.functional.normalize(items + 2 * common, dim=1)
    scores = queries @ gallery.T
    assert (scores.argmax(dim=1) == 0).all()
    hubs = find_hubs(gallery, queries) if gated else None
    calibrated = calibrate_scores(scores, hub_bias(gallery, queries, calibration), hubs)
    assert (calibrated.argmax(dim=1)[1:] == torch.arange(2, 8)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "softmax"}, "Argument `kind` has to be one of"),
        ({"temperature": 0.0}, "Argument `temperature` has to be positive"),
        ({"num_neighbors": 0}, "Argument `num_neighbors` has to be an integer of at least 1"),
        ({"weight": -1.0}, "Argument `weight` has to be at least 0"),
        ({"gate_top_k": 0}, "Argument `gate_top_k` has to be an integer of at least 1"),
    ],
)
def test_calibrations_that_there_are_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        Calibration(**arguments)


@pytest.mark.parametrize("function", [hub_bias, find_hubs])
@pytest.mark.parametrize("bank", [torch.empty(0, 6), torch.ones(3, 5), torch.ones(6)])
def test_a_bank_that_does_not_fit(function, bank):
    with pytest.raises(ValueError, match=r"`bank` has to be of shape \(queries, 6\) with at least one query"):
        function(unit(9, 0), bank)


def test_what_acts_makes_the_same_calibration():
    for calibration in (*KINDS, Calibration(gate_top_k=2)):
        assert Calibration(**calibration.parameters) == calibration
    assert str(Calibration(gate_top_k=2)) == "inverted_softmax, temperature=0.1, gate_top_k=2"
