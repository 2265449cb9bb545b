"""Batches of pairs for the tests of losses without knowledge, and sums of their equations by hand."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tests.helpers.reference import Array, unit_length

# Three samples of clip 4, two of clip 1, and single ones.
CLIPS = torch.tensor([4, 1, 2, 4, 1, 3, 4, 7])


def pairs(seed: int = 0, width: int = 5, clips: Tensor = CLIPS) -> tuple[Tensor, Tensor]:
    """Audio and text embeddings in float64 that agree somewhat and are not normalised."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, len(clips), width, generator=generator, dtype=torch.float64)
    return first, 0.7 * first + 0.7 * second


def similarities(audio: Tensor, text: Tensor) -> dict[str, Array]:
    """Cosine similarities, queries in rows, of both directions."""
    u, v = (unit_length(side.double().numpy()) for side in (audio, text))
    return {"t2a": v @ u.T, "a2t": u @ v.T}


def roles(positives: str, i: int, clips: Tensor = CLIPS) -> tuple[list[int], list[int]]:
    """The positives and the negatives of sample i."""
    same = [j for j in range(len(clips)) if clips[j] == clips[i] and j != i]
    others = [j for j in range(len(clips)) if j != i]
    if positives == "diagonal":
        return [i], others
    others = [j for j in others if j not in same]
    return ([i, *same] if positives == "same_clip" else [i]), others


def mean_of_directions(
    audio: Tensor, text: Tensor, row_loss: Callable[[Array, int], float]
) -> tuple[float, dict[str, float]]:
    """The mean over samples of `row_loss(scores, i)` for each direction, and the mean of both."""
    sides = {
        name: float(np.mean([row_loss(scores[i], i) for i in range(len(scores))]))
        for name, scores in similarities(audio, text).items()
    }
    return sum(sides.values()) / 2, sides
