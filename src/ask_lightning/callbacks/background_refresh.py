"""A refresh that encodes while training goes on, and the checks of what it can be combined with.

It begins where a refresh is due, with a copy of the encoders, and its knowledge is used from the beginning of
the next epoch on, whether it was encoded long before or has to be waited for. So a run does not depend on how
fast it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision, Precision

from ask_lightning.encoding.background import BackgroundEncoder
from ask_lightning.encoding.encode import Encoded, assemble, require_equal_weights
from ask_lightning.encoding.row_limit import RowLimit
from ask_lightning.encoding.sharding import is_sharded
from ask_lightning.encoding.training_copy import TrainingCopy
from ask_lightning.utilities.distributed import Ranks


class BackgroundRefresh:
    """A refresh in flight: encoders as they were when it was due, and what encodes with them; collective.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        loaders: Loader of this rank's items of the source, and perhaps one of the training data behind it.
        limits: Number of rows to read of each loader at most.
        ranks: The processes among which the source is divided.
        state: The `state` of a refresh that a checkpoint holds. None: it is due now.
        encodes: Whether to encode. If not, the copy is kept for a checkpoint alone.

    Attributes:
        epoch: The epoch in which it was due.
        loaders: The loaders that are read.

    Raises:
        RuntimeError: The module cannot be copied, the source cannot be read by worker processes, the encoders
            draw random numbers, or another rank failed.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        loaders: Sequence[Iterable[Any]],
        limits: Sequence[RowLimit],
        ranks: Ranks,
        state: Mapping[str, Any] | None = None,
        *,
        encodes: bool = True,
    ) -> None:
        started = time.perf_counter()
        self._ranks = ranks
        self._encoder: BackgroundEncoder | None = None
        now = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        with ranks.all_or_none("copying the encoders"):
            self._encoders = TrainingCopy(trainer, module, **(now if state is None else state))
        self._encoders.share_buffers(ranks)
        self.epoch, self.loaders = self._encoders.epoch, list(loaders)
        self._limits = limits
        if encodes:
            self._encoder = self._make_encoder()
        self._waited = time.perf_counter() - started

    def _make_encoder(self) -> BackgroundEncoder:
        """What encodes, with its first batches behind it; collective."""
        require_equal_weights(self._encoders.trainer, self._encoders.module, self.loaders[0], self._ranks)
        with self._ranks.all_or_none("starting to encode its part of the knowledge source"):
            return BackgroundEncoder(self._encoders, self.loaders, self._limits)

    def start(self) -> None:
        """Encode in the background."""
        if self._encoder is not None:
            self._encoder.start()

    def check(self) -> None:
        """Raise the error in which encoding has ended, if it has.

        On several ranks it is left to `finish`, at which all of them learn of it: the others would wait for
        this one in their training step.

        Raises:
            BaseException: The error, with the traceback of the thread.
        """
        if self._ranks.size == 1 and self._encoder is not None:
            self._encoder.raise_failure()

    def finish(self, step: int) -> tuple[list[Encoded], float, dict[str, float]]:
        """Wait until all ranks have encoded their parts, and put the parts together; collective.

        Args:
            step: Number of optimiser steps so far.

        Returns:
            The embeddings of each loader, how many seconds encoding took, and values for the log:
            `refresh_lag`, the optimiser steps since the weights that encoded, and `refresh_wait_seconds`, how
            long training has stood still for it.

        Raises:
            BaseException: The error in which encoding has ended on this rank.
            RuntimeError: Another rank failed.
        """
        started = time.perf_counter()
        if self._encoder is None:  # the epoch in which it was due was to be the last one
            self._encoder = self._make_encoder()
            self._encoder.start()
        encoder, device = self._encoder, self._encoders.module.device
        with self._ranks.all_or_none("encoding its part of the knowledge source in the background"):
            batches = encoder.wait()
        encoded = [
            assemble(each, loader, device, self._ranks)
            for each, loader in zip(batches, self.loaders, strict=True)
        ]
        waited = self._waited + time.perf_counter() - started
        lag = float(step - self._encoders.step)
        return encoded, encoder.seconds, {"refresh_lag": lag, "refresh_wait_seconds": waited}

    def stop(self) -> None:
        """End the thread after the batch that it is at."""
        if self._encoder is not None:
            self._encoder.stop()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: epoch, step, and the weights that training has changed since."""
        encoders = self._encoders
        return {"epoch": encoders.epoch, "step": encoders.step, "weights": encoders.changed_weights()}


def check_background(trainer: pl.Trainer) -> None:
    """Refuse trainers with which a refresh cannot encode in the background.

    Args:
        trainer: Trainer at the start of `fit`.

    Raises:
        RuntimeError: The strategy divides the weights among processes, or the precision changes the default
            dtype, which threads share.
    """
    if is_sharded(trainer):
        raise RuntimeError(
            "KnowledgeRefreshCallback(in_background=True) encodes by a copy of the encoders, but with "
            f"{type(trainer.strategy).__name__} no process has all of their weights, and a forward pass is "
            "an exchange between ranks, which cannot take place beside those of training. Leave "
            "`in_background` out."
        )
    plugin = trainer.precision_plugin
    if not (type(plugin) is Precision or isinstance(plugin, MixedPrecision | DeepSpeedPrecision)):
        raise RuntimeError(
            "KnowledgeRefreshCallback(in_background=True) encodes while a training step runs, but "
            f'precision="{plugin.precision}" changes the default dtype or other state that all threads '
            'share while it encodes. Train with "32-true", "16-mixed" or "bf16-mixed", or leave '
            "`in_background` out."
        )
