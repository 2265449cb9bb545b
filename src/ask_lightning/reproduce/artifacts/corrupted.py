"""Pairs of which a share does not belong together."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from ask_lightning.utilities.arguments import check_range

_TEXT_KEYS = ("caption", "text", "words")


class CorruptedPairs(Dataset[dict[str, Any]]):
    """A dataset of pairs of which a share has the text of another pair.

    Args:
        pairs: Dataset whose items are mappings with a text under `"caption"`, `"text"` or `"words"`.
        share: Share of the pairs that get another text, in [0, 1].
        seed: Seed of the choice.

    Raises:
        ValueError: `share` is outside its range.

    Examples:
        >>> pairs = [{"clip_id": number, "caption": f"caption {number}"} for number in range(4)]
        >>> sorted(item["caption"] for item in CorruptedPairs(pairs, 1.0))
        ['caption 0', 'caption 1', 'caption 2', 'caption 3']
        >>> any(item["caption"].endswith(str(item["clip_id"])) for item in CorruptedPairs(pairs, 1.0))
        False
    """

    def __init__(self, pairs: Any, share: float, seed: int = 0) -> None:
        check_range("share", share, 0, 1)
        self.pairs = pairs
        chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[: round(share * len(pairs))]
        # In a circle: nobody keeps its own text, and every text is still there once.
        self._text_of = dict(zip(chosen.tolist(), chosen.roll(1).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row >= len(self.pairs):
            raise IndexError(row)
        item = dict(self.pairs[row])
        if row in self._text_of:
            other = self.pairs[self._text_of[row]]
            item |= {key: other[key] for key in _TEXT_KEYS if key in other}
        return item

    def without_random_crops(self) -> CorruptedPairs:
        """The same pairs, read without random crops where the dataset has them."""
        fixed = getattr(self.pairs, "without_random_crops", None)
        if fixed is None:
            return self
        copied = CorruptedPairs(fixed(), 0.0)
        copied._text_of = self._text_of
        return copied
