"""Maps from old embeddings to new ones, against scipy and closed forms in float64."""

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from ask_lightning.functional.embedding_map import orthogonal_map, ridge_map
from tests.helpers.vectors import directions, generator


def pair(rows: int = 60, width: int = 7, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    old = directions(rows, width, 0, torch.float64)
    change = torch.randn(width, width, generator=generator(1), dtype=torch.float64)
    return old, old @ change + noise * directions(rows, width, 2, torch.float64)


def test_orthogonal_map_is_that_of_scipy():
    old, new = pair()
    expected, _ = orthogonal_procrustes(old.numpy(), new.numpy())
    np.testing.assert_allclose(orthogonal_map(old, new).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(orthogonal_map(old.float(), new.float()).numpy(), expected, atol=1e-4)


def test_it_turns_rows_without_bending_them():
    turn = orthogonal_map(*pair())
    torch.testing.assert_close(turn.T @ turn, torch.eye(7, dtype=torch.float64))


def test_what_no_row_says_stays():
    """Two rows in ten dimensions: the other eight are left alone."""
    old = torch.eye(10, dtype=torch.float64)[:2]
    found = orthogonal_map(old, old[[1, 0]])
    expected = torch.eye(10, dtype=torch.float64)
    expected[:2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def ridge_in_numpy(old: np.ndarray, new: np.ndarray, rank: int, ridge: float) -> np.ndarray:
    """As the stacked least-squares problem, and its low-rank part by the SVD of the predictions."""
    turn, _ = orthogonal_procrustes(old, new)
    width = old.shape[1]
    weight = np.sqrt(ridge * (old**2).sum() / width)
    left = np.concatenate([old, weight * np.eye(width)])
    right = np.concatenate([new - old @ turn, np.zeros((width, width))])
    correction = np.linalg.lstsq(left, right, rcond=None)[0]
    leading = np.linalg.svd(old @ correction)[2][:rank]
    return turn + correction @ leading.T @ leading


@pytest.mark.parametrize("rank", [1, 3, 7, 100])
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_ridge_map_against_least_squares(rank, ridge):
    old, new = pair()
    expected = ridge_in_numpy(old.numpy(), new.numpy(), min(rank, 7), ridge)
    np.testing.assert_allclose(
        ridge_map(old, new, orthogonal_map(old, new), rank=rank, ridge=ridge).numpy(), expected, atol=1e-4
    )


def test_a_linear_change_is_found_by_the_correction_and_not_by_the_turn():
    old, new = pair(noise=0.0)
    full = ridge_map(old, new, orthogonal_map(old, new), rank=7, ridge=1e-9)
    torch.testing.assert_close(old @ full, new, atol=1e-5, rtol=1e-5)
    assert (old @ orthogonal_map(old, new) - new).norm() > 1


@pytest.mark.parametrize(("options", "text"), [({"rank": 0}, "`rank`"), ({"rank": 1, "ridge": 0}, "`ridge`")])
def test_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        ridge_map(*pair(), orthogonal_map(*pair()), **options)
