"""`ClusterSignalCallback`: all processes of a run answer a signal at the same place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, Checkpoint

from ask_lightning.utilities.distributed import Ranks

_Handler = Callable[[int, FrameType | None], Any]


class ClusterSignalCallback(Callback):
    """Has a run on several processes answer SIGTERM and SLURM's signal at the end of a training step.

    Lightning answers both in the midst of whatever a process is doing, by operations that all processes have
    to take part in: SIGTERM by a broadcast, SLURM's signal by a checkpoint. Processes that are at different
    places then wait for each other forever, or fail, and the checkpoint is not written. With this callback a
    process only notes the signal. At the end of the step all of them learn of it, also where one alone has
    received it, and do what Lightning does; where gradients are accumulated, behind the batch with which they
    make a step, since a checkpoint does not hold gradients. A signal during a refresh is answered behind it,
    one during a validation behind the validation. A run on one process is interrupted at once, as without the
    callback.

    Notes:
        Each signal is answered once in a `fit`. Ask SLURM to send it earlier than the longest refresh and
        validation take: `#SBATCH --signal=SIGUSR1@600` is ten minutes before the time is over. A step costs
        one small reduction more, for which the host waits. Wherever the callback is placed, it acts behind
        all others but those that save checkpoints, so that what they do at the end of a step, such as
        averages of weights, is in the checkpoint.

    Examples:
        >>> from ask_lightning import KnowledgeRefreshCallback
        >>> callbacks = [KnowledgeRefreshCallback(T=15), ClusterSignalCallback()]  # of a Trainer
    """

    def __init__(self) -> None:
        self._handlers: dict[int, _Handler] = {}  # Lightning's
        self._noted: set[int] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes its place behind the callbacks that do something at the end of a step."""
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if callback is not self]
        saving = [callback for callback in others if isinstance(callback, Checkpoint)]
        acting = [callback for callback in others if not isinstance(callback, Checkpoint)]
        # Another list, because Lightning goes through the present one. It has checkpoint callbacks last, too.
        trainer.callbacks = [*acting, self, *saving]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes signals from now on, in place of Lightning's handlers, which it takes back after `fit`."""
        self._handlers, self._noted = {}, set()
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        numbers: set[int] = {signal.SIGTERM}
        if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
            numbers.add(environment.requeue_signal)
        for number in numbers:
            handler = signal.getsignal(number)
            if callable(handler) and type(handler).__module__.startswith("lightning."):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(number)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answers those that came in the refresh before, or in the writing of a checkpoint; collective."""
        self._answer(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answers the signals that a process has noted, unless gradients wait for more; collective."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._answer(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answers those that came while the run was validated; collective."""
        self._answer(trainer)

    def _answer(self, trainer: pl.Trainer) -> None:
        if trainer.world_size == 1:
            return
        noted = self._noted & self._handlers.keys()
        if not trainer.strategy.reduce_boolean_decision(bool(noted), all=False):
            return
        for number in sorted(set[int]().union(*Ranks.current().all_gather_object(noted))):
            handler = self._handlers.pop(number, None)  # once: it reaches the processes one after another
            if handler is not None:
                handler(number, None)
