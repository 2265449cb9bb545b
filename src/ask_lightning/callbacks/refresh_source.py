"""The knowledge source as a refresh reads it: its loaders, and how much of it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn

from ask_lightning.encoding.isolation import preserved_random_state
from ask_lightning.encoding.row_limit import RowLimit, limiting_option, rows_of_an_epoch
from ask_lightning.encoding.source_loader import Source, batch_size_of, has_index, source_loader
from ask_lightning.utilities.distributed import Ranks


class SourceReader:
    """Opens the knowledge source, and the training data beside it.

    Args:
        source: What `KnowledgeRefreshCallback` takes as its source.
        batch_size: Number of pairs per batch; None: that of the loader.
        num_workers: Number of worker processes; None: that of the loader.
        max_rows: Number of pairs, over all ranks, that are read at most of the source, and beside it of
            training data that are a stream; None: all of them.
    """

    def __init__(
        self,
        source: Source | Callable[[], Source] | None,
        batch_size: int | None,
        num_workers: int | None,
        max_rows: int | None,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_rows = max_rows
        self._told_limit = False

    def restart(self) -> None:
        """Say in a new run again what has been said once."""
        self._told_limit = False

    def open(self, trainer: pl.Trainer, num_neighbors: int, *, training_data: bool = False) -> Iterable[Any]:
        """Make a new loader over this rank's items of the source, in order.

        Args:
            trainer: The running trainer, whose training data are the default source.
            num_neighbors: K, the number of neighbours of a lookup.
            training_data: Whether to read the training data whatever the source is.
        """
        source = None if training_data else self.source
        with preserved_random_state():  # a callable that makes the source may draw
            try:
                return source_loader(
                    source,
                    trainer.train_dataloader,
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                    ranks=Ranks.current(),
                    max_items=self.max_items(trainer, num_neighbors, training_data=source is None),
                )
            except TypeError as error:
                if not training_data:
                    raise
                raise TypeError(
                    "A loss with a teacher has the training clips encoded beside `source`, but the training "
                    f"data are a {type(trainer.train_dataloader).__name__}, which a refresh cannot read by "
                    "itself. Train from one DataLoader, or with a loss without a teacher."
                ) from error

    def max_items(
        self, trainer: pl.Trainer, num_neighbors: int, *, training_data: bool | None = None
    ) -> int | None:
        """Number of items that are read at most, over all ranks; `None` for all.

        Args:
            trainer: The running trainer.
            num_neighbors: K, the number of neighbours of a lookup.
            training_data: Whether it is the training data that are read. None: as the source says.
        """
        if training_data is None:
            training_data = self.source is None
        # All clips of training are wanted beside a source; of a stream nothing else may end the reading.
        is_beside = training_data and self.source is not None and has_index(trainer.train_dataloader)
        limits = [] if self.max_rows is None or is_beside else [self.max_rows]
        option = limiting_option(trainer, is_training_data=training_data and not is_beside)
        size = batch_size_of(trainer.train_dataloader)
        if option is not None and size is not None:
            visited = int(trainer.num_training_batches) * size * Ranks.current().size
            # Enough for a lookup, and for one that leaves the query's own clip out.
            limits.append(max(visited, 2 * num_neighbors))
            if not self._told_limit:
                self._told_limit = True
                rank_zero_warn(
                    f"With {option} a refresh reads {limits[-1]} pairs of the knowledge source, if it has so "
                    "many. Of others, which a loader that shuffles draws as well, a teacher knows nothing. "
                    "To have all of the training data in the knowledge, pass them: "
                    "KnowledgeRefreshCallback(source=dataset)."
                )
        return min(limits, default=None)

    def row_limits(
        self, trainer: pl.Trainer, num_neighbors: int, loaders: list[Iterable[Any]]
    ) -> list[RowLimit]:
        """What this rank reads of sources whose items cannot be counted beforehand.

        Args:
            trainer: The running trainer.
            num_neighbors: K, the number of neighbours of a lookup.
            loaders: Loader of the source, and perhaps one of the training data behind it.
        """
        size = batch_size_of(trainer.train_dataloader)
        visited = rows_of_an_epoch(trainer, size)
        limits = []
        for number, loader in enumerate(loaders):
            training_data = number > 0 or self.source is None
            most = self.max_items(trainer, num_neighbors, training_data=training_data)
            option = limiting_option(trainer, is_training_data=training_data)
            batches = int(trainer.num_training_batches) if option and size is None else None
            is_counted = has_index(loader) and getattr(loader, "batch_size", None) is not None
            take = None if most is None or is_counted else -(-most // Ranks.current().size)
            limits.append(RowLimit(take, batches, visited))
        return limits


def num_batches(loaders: Iterable[object]) -> int | None:
    """The length of all loaders together, if each has one.

    Args:
        loaders: The loaders.
    """
    try:
        return sum([len(loader) for loader in loaders])  # type: ignore[arg-type, misc]
    except TypeError:  # no length, or that of a DataLoader over an iterable dataset
        return None
