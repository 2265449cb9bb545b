"""What the tests of losses with further negatives share: batches, and cross-entropy by hand."""

import numpy as np
import torch
from torch import Tensor

from tests.helpers import reference

TEMPERATURE = 0.3


def agreeing(rows: int, seed: int, width: int = 5) -> tuple[Tensor, Tensor]:
    """Pairs that agree somewhat, not normalised, in float64."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return first, 0.7 * first + 0.7 * second


def unit(side: Tensor) -> np.ndarray:
    return reference.unit_length(side.detach().double().numpy())


def entropy(query: np.ndarray, positive: np.ndarray, negatives: list[np.ndarray]) -> float:
    """-log of the softmax probability of the positive, at the temperature of these tests."""
    scores = np.array([query @ candidate for candidate in (positive, *negatives)]) / TEMPERATURE
    return float(np.log(np.exp(scores).sum()) - scores[0])


def plain(audio: Tensor, text: Tensor, ids: Tensor | None = None) -> float:
    """NT-Xent, without pairs of one clip if there are ids."""
    u, v = unit(audio), unit(text)
    size, total = len(u), 0.0
    for i in range(size):
        others = [j for j in range(size) if j != i and (ids is None or ids[i] != ids[j])]
        total += entropy(u[i], v[i], [v[j] for j in others]) + entropy(v[i], u[i], [u[j] for j in others])
    return total / size / 2
