"""`hub_bias` against numpy, and what it does to hubs."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from ask_lightning.functional.calibration import hub_bias


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
    found = hub_bias(gallery, bank, temperature=temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 5, 31, 100])
def test_nearest_neighbors(count):
    gallery, bank = unit(9, 0), unit(31, 1)
    expected = 0.5 * np.sort((bank @ gallery.T).numpy(), axis=0)[::-1][:count].mean(axis=0)
    found = hub_bias(gallery, bank, calibration="nearest_neighbors", num_neighbors=count, weight=0.5)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("calibration", ["inverted_softmax", "nearest_neighbors"])
def test_blocks_change_nothing(calibration, monkeypatch):
    gallery, bank = unit(9, 0), unit(31, 1)
    whole = hub_bias(gallery, bank, calibration=calibration)
    monkeypatch.setattr("ask_lightning.functional.calibration._SCORES_PER_BLOCK", 62)
    torch.testing.assert_close(hub_bias(gallery, bank, calibration=calibration), whole)


@pytest.mark.parametrize("calibration", ["inverted_softmax", "nearest_neighbors"])
def test_a_hub_loses_the_queries_that_are_not_its_own(calibration):
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
    calibrated = scores - hub_bias(gallery, queries, calibration=calibration, weight=1.0, num_neighbors=3)
    assert (calibrated.argmax(dim=1)[1:] == torch.arange(2, 8)).all()
