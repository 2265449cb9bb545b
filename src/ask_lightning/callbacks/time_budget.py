"""What part of a run's time its refreshes take."""

from __future__ import annotations

import time
from collections.abc import Callable


class TimeBudget:
    """Measures the time of a run and of its refreshes, over all parts of a run that is resumed.

    Args:
        clock: Function that returns the time in seconds.

    Examples:
        >>> now = iter([0.0, 90.0, 100.0])
        >>> budget = TimeBudget(clock=lambda: next(now))
        >>> budget.start()
        >>> budget.spend(5.0)
        >>> budget.affords(max_share=0.1), round(budget.share, 3)  # 5 s again after 90 s; 5 of 100 s
        (False, 0.05)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None
        self._before = 0.0
        self._spent = 0.0
        self._last = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken so far."""
        return self._before + (0.0 if self._started is None else self._clock() - self._started)

    @property
    def share(self) -> float:
        """The share of the refreshes in the time so far."""
        elapsed = self.elapsed
        return self._spent / elapsed if elapsed > 0 else 0.0

    def start(self) -> None:
        """Let the time run."""
        self.stop()
        self._started = self._clock()

    def stop(self) -> None:
        """Let the time stand still."""
        self._before, self._started = self.elapsed, None

    def learn_cost(self, seconds: float) -> None:
        """Note how long a refresh takes, without counting it: the first one, which every run needs.

        Args:
            seconds: Duration of that refresh.
        """
        self._last = seconds

    def spend(self, seconds: float) -> None:
        """Count a refresh.

        Args:
            seconds: Duration of that refresh.
        """
        self._spent += seconds
        self._last = seconds

    def affords(self, max_share: float) -> bool:
        """Whether the share stays within its bound after one more refresh as long as the last one.

        Args:
            max_share: Largest share, in (0, 1].
        """
        return self._spent + self._last <= max_share * (self.elapsed + self._last)

    def state(self) -> dict[str, float]:
        """The times, as numbers."""
        return {"elapsed": self.elapsed, "spent": self._spent, "last": self._last}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from the `state` of an earlier part of the run.

        Args:
            state: The times.
        """
        self._before, self._spent, self._last = state["elapsed"], state["spent"], state["last"]
