"""The one refresh that may be in flight in the background, over checkpoints and resumed runs."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from ask_lightning.callbacks.background_refresh import BackgroundRefresh
from ask_lightning.callbacks.renewal import Renewer
from ask_lightning.utilities.distributed import Ranks


class BackgroundSlot:
    """Holds the `BackgroundRefresh` in flight, or the state of one that was broken off.

    Attributes:
        refresh: What is in flight; `None` for nothing.
        broken_off: The state of a refresh that has to begin anew, for `resume`.
    """

    def __init__(self) -> None:
        self.refresh: BackgroundRefresh | None = None
        self.broken_off: dict[str, Any] | None = None

    def rehearse(self, trainer: pl.Trainer, module: pl.LightningModule, renewer: Renewer) -> None:
        """See at the start of a run whether refreshes can encode in the background; collective.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            renewer: What opens its source.

        Raises:
            RuntimeError: They cannot, see `BackgroundRefresh`.
        """
        assert isinstance(renewer.period, int)
        if self.refresh is None and _num_epochs(trainer) > renewer.period:
            loaders, limits = renewer.open(trainer)
            BackgroundRefresh(trainer, module, loaders, limits, Ranks.current()).stop()

    def begin(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        renewer: Renewer,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin a refresh that encodes while training goes on, unless one is in flight; collective.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            renewer: What opens its source.
            state: The state of a refresh that was broken off. None: it is due now.

        Raises:
            RuntimeError: It cannot encode in the background, see `BackgroundRefresh`.
        """
        if self.refresh is not None:
            return
        due = trainer.current_epoch if state is None else state["epoch"]
        self.refresh = BackgroundRefresh(
            trainer,
            module,
            *renewer.open(trainer),
            Ranks.current(),
            state,
            encodes=due + 1 < _num_epochs(trainer),  # nothing uses what the last epoch would encode
        )
        self.refresh.start()

    def resume(
        self, trainer: pl.Trainer, module: pl.LightningModule, renewer: Renewer, *, in_background: bool
    ) -> None:
        """Begin anew the refresh that was in flight in a checkpoint, or when this trainer stopped.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            renewer: What opens its source.
            in_background: Whether this run refreshes in the background. If not, the refresh is left out with
                a warning.
        """
        self.end()  # one that an error has left
        state, self.broken_off = self.broken_off, None
        if state is None:
            return
        if in_background:
            self.begin(trainer, module, renewer, state)
            return
        rank_zero_warn(
            f"The run resumes without the refresh of epoch {state['epoch']} that was in flight, so its "
            "losses differ from those of a run without a break, which goes on by "
            "KnowledgeRefreshCallback(in_background=True)."
        )

    def due_at(self, epoch: int) -> BackgroundRefresh | None:
        """The refresh whose knowledge an epoch shall use, if one of an earlier epoch is in flight.

        Args:
            epoch: The present epoch.

        Raises:
            BaseException: The error in which encoding has ended.
        """
        if self.refresh is None:
            return None
        self.refresh.check()
        return None if self.refresh.epoch == epoch else self.refresh

    def stop(self) -> None:
        """End the thread; what it was at may still belong into a checkpoint."""
        if self.refresh is not None:
            self.refresh.stop()

    def end(self) -> None:
        """End what encodes, and keep what it takes to begin anew."""
        if self.refresh is not None:
            self.refresh.stop()
            self.broken_off, self.refresh = self.refresh.state(), None

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps; `None` while nothing is in flight."""
        return self.broken_off if self.refresh is None else self.refresh.state()


def _num_epochs(trainer: pl.Trainer) -> float:
    """The number of epochs of a run, which may be infinite."""
    return math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
