"""The splits of a dataset, and how to make them from one table."""

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Literal

Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
"""All splits, in their usual order."""


def split_by_clip(clip_ids: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Divide items into parts so that no clip is in two of them.

    The part of a clip depends on `seed`, its id and the ids of the other clips, not on their order. The
    division is the same on every machine.

    Args:
        clip_ids: Clip of each item, as a number or a text.
        fractions: Share of the clips in each part, each above 0, with sum 1.
        seed: Seed of the division.

    Returns:
        For each part the indices of its items, ascending.

    Raises:
        ValueError: The fractions do not sum to 1, or a part would be empty.

    Examples:
        >>> train, val = split_by_clip([7, 7, 8, 9, 9, 10], (0.5, 0.5))
        >>> sorted(train + val), len(train) in (2, 3, 4)
        ([0, 1, 2, 3, 4, 5], True)
    """
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"Argument `fractions` has to be positive numbers with sum 1, but got {fractions}.")
    # Ordered by a hash and not by a random generator: numpy and torch do not promise the same permutation in
    # every version.
    clips = sorted(set(clip_ids), key=lambda clip: _digest(f"{seed}:{clip}"))
    ends = [round(len(clips) * sum(fractions[: part + 1])) for part in range(len(fractions))]
    part_of_clip: dict[Hashable, int] = {}
    for part, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start == end:
            raise ValueError(
                f"Part {part} of `fractions` {fractions} would be empty: there are only {len(clips)} clips."
            )
        part_of_clip.update(dict.fromkeys(clips[start:end], part))
    parts: list[list[int]] = [[] for _ in fractions]
    for index, clip in enumerate(clip_ids):
        parts[part_of_clip[clip]].append(index)
    return parts


def _digest(text: str) -> bytes:
    # Names of files may be of another encoding.
    return hashlib.blake2b(text.encode(errors="surrogatepass")).digest()
