"""A refresh when the drift asks for it and the time allows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ask_lightning.callbacks.drift_tracker import DriftTracker
from ask_lightning.callbacks.time_budget import TimeBudget
from ask_lightning.utilities.arguments import check_positive, check_range
from ask_lightning.utilities.distributed import Ranks

# A refresh that has been put off is no longer wanted when the drift has fallen to this share of the bound.
_RELEASE = 0.5


@dataclass(frozen=True)
class AutoPeriod:
    """When `KnowledgeRefreshCallback(T=...)` refreshes by the drift that training steps see.

    A refresh is wanted at the end of an epoch when the drift has passed `max_drift`, and until it has fallen
    to half of that; it takes place as soon as the time allows it. See
    `ask_lightning.callbacks.drift_tracker.DriftTracker` for the drift.

    Args:
        max_drift: Largest drift that is left alone: the distance of a stored row to its fresh embedding, in
            units of the distance between two rows. Above 0.
        max_share: Largest share of the run's time that refreshes after the first one may take, in (0, 1].

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> AutoPeriod(max_share=0.05)
        AutoPeriod(max_drift=0.05, max_share=0.05)
    """

    max_drift: float = 0.05
    max_share: float = 0.1

    def __post_init__(self) -> None:
        check_positive("max_drift", self.max_drift)
        check_positive("max_share", self.max_share)
        check_range("max_share", self.max_share, 0, 1)


def is_wanted(drift: float, max_drift: float, *, was_wanted: bool) -> bool:
    """Whether a drift asks for a refresh, with hysteresis.

    Args:
        drift: Drift at present.
        max_drift: Bound that has to be passed.
        was_wanted: Whether an earlier drift has asked for a refresh that has not taken place yet.

    Examples:
        >>> [is_wanted(drift, 0.1, was_wanted=True) for drift in (0.04, 0.06, 0.2)]
        [False, True, True]
        >>> [is_wanted(drift, 0.1, was_wanted=False) for drift in (0.04, 0.06, 0.2)]
        [False, False, True]
    """
    return drift > (_RELEASE * max_drift if was_wanted else max_drift)


class AutoSchedule:
    """Decides at each epoch whether the knowledge is refreshed, the same on all ranks.

    Args:
        period: The bounds.
        budget: The measure of time; that of rank 0 counts.

    Attributes:
        num_refreshes: Number of refreshes after the first one.
        num_batches: Number of batches since the last refresh, of this part of the run.
    """

    def __init__(self, period: AutoPeriod, budget: TimeBudget | None = None) -> None:
        self.period = period
        self.budget = budget or TimeBudget()
        self.num_refreshes = 0
        self._tracker = DriftTracker()
        self._was_wanted = False
        self._refreshed_at = -1
        self.num_batches = 0

    def add(self, current: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], *, step: int) -> None:
        """Take the rows of a training batch into account, see `DriftTracker.add`; not collective.

        Args:
            current: Audio and text, `(n, d)` each, as the step has embedded them.
            stored: Audio and text of these rows, `(n, d)` each, as they are stored.
            step: Number of optimiser steps before the embeddings were made.
        """
        self.num_batches += 1
        if len(current[0]) > 1:
            self._tracker.add(current, stored, is_floor=step == self._refreshed_at)

    def drift(self, ranks: Ranks) -> float:
        """The mean drift of the ranks that have measured one; NaN if none has. Collective.

        Args:
            ranks: The processes of the run.
        """
        own = None if self._tracker.is_empty else self._tracker.drift
        measured = [drift for drift in ranks.all_gather_object(own) if drift is not None]
        return sum(measured) / len(measured) if measured else math.nan

    def share(self, ranks: Ranks) -> float:
        """The share of the refreshes in the time so far, by the clock of rank 0. Collective.

        Args:
            ranks: The processes of the run.
        """
        return float(ranks.all_gather_object(self.budget.share)[0])

    def decide(self, ranks: Ranks) -> bool:
        """Whether to refresh now. Collective.

        Args:
            ranks: The processes of the run.
        """
        drift = self.drift(ranks)
        self._was_wanted = is_wanted(drift, self.period.max_drift, was_wanted=self._was_wanted)
        affords = bool(ranks.all_gather_object(self.budget.affords(self.period.max_share))[0])
        return self._was_wanted and affords

    def note_refresh(self, seconds: float, *, step: int, is_first: bool) -> None:
        """Begin anew with new knowledge.

        Args:
            seconds: Duration of the refresh.
            step: Number of optimiser steps so far.
            is_first: Whether there was no knowledge before.
        """
        if is_first:
            self.budget.learn_cost(seconds)
        else:
            self.budget.spend(seconds)
            self.num_refreshes += 1
        self._tracker.restart()
        self._refreshed_at, self.num_batches = step, 0
        self._was_wanted = False

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """What decisions depend on, as numbers. Collective: each rank has a tracker of its own.

        Args:
            ranks: The processes of the run.
        """
        return {
            "trackers": ranks.all_gather_object(self._tracker.state()),
            "budget": self.budget.state(),
            "num_refreshes": self.num_refreshes,
            "was_wanted": self._was_wanted,
            "refreshed_at": self._refreshed_at,
        }

    def load_state(self, state: dict[str, Any], ranks: Ranks) -> None:
        """Go on from the `state` of an earlier part of the run.

        Args:
            state: The state. With another number of ranks than it is of, a rank may have the tracker of
                another one, whose batches were of the same data.
            ranks: The processes of the run.
        """
        trackers = state["trackers"]
        self._tracker.load_state(trackers[ranks.rank % len(trackers)])
        self.budget.load_state(state["budget"])
        self.num_refreshes = state["num_refreshes"]
        self._was_wanted = state["was_wanted"]
        self._refreshed_at = state["refreshed_at"]
