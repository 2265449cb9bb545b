"""Half precision, autocast and options that do not exist."""

import pytest
import torch
import torch.nn.functional as F

from ask_lightning.functional import realign_similarity, representation_drift


def test_drift_survives_half_precision():
    generator = torch.Generator().manual_seed(0)
    current = F.normalize(torch.randn(200, 16, generator=generator), dim=1).bfloat16()
    stored = (current.float() + 0.02 * torch.randn(200, 16, generator=generator)).bfloat16()
    expected = representation_drift(current.double(), current.double(), stored.double())
    assert representation_drift(current, current, stored).item() == pytest.approx(expected.item(), rel=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drift = representation_drift(current.float(), current.float(), stored.float())
    assert drift.item() == pytest.approx(expected.item(), rel=1e-3)


def test_drift_without_queries():
    with pytest.raises(ValueError, match="`queries` has to hold at least one embedding"):
        representation_drift(torch.ones(0, 3), torch.ones(4, 3), torch.ones(4, 3))


def test_unknown_plan_scaling():
    with pytest.raises(ValueError, match='`plan_scaling` has to be "marginal" or "row", but got \'rows\''):
        realign_similarity(torch.eye(3), torch.eye(3) / 3, plan_scaling="rows")
