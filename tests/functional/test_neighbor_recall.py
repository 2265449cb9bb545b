"""The share of true neighbours that stored rows still give."""

import numpy as np
import pytest
import torch

from ask_lightning.functional import neighbor_recall as module
from ask_lightning.functional.neighbor_recall import neighbor_recall
from tests.helpers.vectors import directions


def reference(queries, current, stored, k, own=None) -> float:
    shares = []
    for number, query in enumerate(queries.double().numpy()):
        sets = []
        for rows in (current, stored):
            scores = rows.double().numpy() @ query
            if own is not None:
                scores[own[number]] = -np.inf
            sets.append(set(np.argsort(-scores)[:k].tolist()))
        shares.append(len(sets[0] & sets[1]) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("own", [False, True])
def test_against_numpy(k, own, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES_PER_BLOCK", 7)
    current = directions(50, 6, 0, torch.float64)
    stored = torch.nn.functional.normalize(current + 0.5 * directions(50, 6, 1, torch.float64), dim=1)
    rows = torch.arange(3, 43)
    found = neighbor_recall(current[rows], current, stored, k, own_rows=rows if own else None)
    expected = reference(current[rows], current, stored, k, rows.tolist() if own else None)
    assert float(found) == pytest.approx(expected)
    assert 0 < expected < 1


def test_the_same_rows_are_all_found_and_a_query_is_no_neighbour_of_itself():
    rows = directions(5, 4, 0)
    assert neighbor_recall(rows, rows, rows, 10, own_rows=torch.arange(5)) == 1


@pytest.mark.parametrize(
    ("rows", "k", "text"),
    [(5, 0, "`k`"), (0, 1, "queries and rows to find"), (1, 1, "queries and rows to find")],
)
def test_arguments(rows, k, text):
    table = directions(rows, 4, 0) if rows else torch.empty(0, 4)
    with pytest.raises(ValueError, match=text):
        neighbor_recall(table, table, table, k, own_rows=torch.arange(rows))


def test_other_rows():
    with pytest.raises(ValueError, match="`current` and `stored` have to hold the same rows"):
        neighbor_recall(torch.eye(3), torch.eye(3), torch.eye(3)[:2])
