"""How far the encoders have moved from the stored rows of the batches, seen in the training steps themselves.

Axes: `n` rows of a batch, `d` width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ask_lightning.functional.drift import mean_displacement, mean_spread

# Share of the past in the running means; they look back over about ten batches.
_DECAY = 0.9


@dataclass
class _RunningMean:
    """A mean of the last values, which starts as the plain mean of all of them."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(1 - _DECAY, 1 / self.count) * (value - self.value)


@dataclass
class _Side:
    """What is known of one modality."""

    displacement: _RunningMean = field(default_factory=_RunningMean)
    spread: _RunningMean = field(default_factory=_RunningMean)
    floor: _RunningMean = field(default_factory=_RunningMean)

    def drift(self) -> float:
        # Dropout turns a fresh row away from the one that it was without dropout, whatever the encoders have
        # done since: cosines of independent turns multiply, so the share of dropout is divided out.
        kept = max(1 - self.floor.value, 1e-6)
        moved = (self.displacement.value - self.floor.value) / kept
        return max(0.0, moved / max(self.spread.value, 1e-6))


class DriftTracker:
    """Running drift of the rows of the training batches from what is stored of them, per modality.

    The drift is the mean cosine distance of a row's fresh embedding to its stored one, without what is there
    right after a refresh already, in units of the mean cosine distance between two rows: 0 where nothing has
    moved, 1 where a row is as far from its stored self as from any other row.

    Examples:
        >>> import torch
        >>> tracker, rows = DriftTracker(), torch.eye(2)
        >>> tracker.add((rows, rows), (rows, rows), is_floor=True)
        >>> turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> tracker.add((turned, rows), (rows, rows))
        >>> round(tracker.drift, 6)
        0.2
    """

    def __init__(self) -> None:
        self._audio, self._text = _Side(), _Side()

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been measured since the last `restart`."""
        return self._audio.displacement.count == 0

    @property
    def drift(self) -> float:
        """The larger drift of the two modalities; 0 where nothing has been measured."""
        return max(self._audio.drift(), self._text.drift())

    def add(
        self, current: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], *, is_floor: bool = False
    ) -> None:
        """Take the rows of a training batch into account.

        Args:
            current: Audio and text, `(n, d)` each, as the step has embedded them; unit vectors, n ≥ 2.
            stored: Audio and text of these rows, `(n, d)` each, as they are stored.
            is_floor: Whether the encoders are still those that made the stored rows. The first batch counts
                as such in any case.
        """
        is_floor = is_floor or self.is_empty
        for side, now, before in zip((self._audio, self._text), current, stored, strict=True):
            displacement, spread = float(mean_displacement(now, before)), float(mean_spread(now))
            side.displacement.add(displacement)
            side.spread.add(spread)
            if is_floor:
                side.floor.add(displacement)

    def restart(self) -> None:
        """Forget everything, because the knowledge is new."""
        self._audio, self._text = _Side(), _Side()

    def state(self) -> dict[str, Any]:
        """The running means, as numbers."""
        return {"audio": asdict(self._audio), "text": asdict(self._text)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the `state` of another tracker.

        Args:
            state: The running means.
        """
        self._audio, self._text = (
            _Side(**{name: _RunningMean(**mean) for name, mean in state[side].items()})
            for side in ("audio", "text")
        )
