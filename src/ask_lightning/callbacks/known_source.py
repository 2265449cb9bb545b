"""Whether a refresh reads the source that the knowledge in use was made of, and the same one on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import Subset

from ask_lightning.encoding.encode import encode_source
from ask_lightning.encoding.sharding import is_sharded
from ask_lightning.encoding.source_identity import given_dataset_of, source_key, weak_reference
from ask_lightning.encoding.source_loader import has_index, num_items, source_loader
from ask_lightning.encoding.target import Target
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.stored_clips import StoredClips
from ask_lightning.utilities.distributed import Ranks


class KnownSource:
    """What is known of the source of the base in use.

    Attributes:
        key: What tells sources apart without reading them, see `source_key`; `None` while nothing is known.
    """

    def __init__(self) -> None:
        self.key: dict[str, Any] | None = None
        self._dataset: Callable[[], object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process, such as by `ddp_spawn`; a weak reference cannot be."""
        return vars(self) | {"_dataset": None}

    def note(self, loader: Iterable[Any]) -> None:
        """Remember a source, which is not kept alive by it.

        Args:
            loader: The loader that a refresh has read.
        """
        self.key, self._dataset = source_key(loader), weak_reference(given_dataset_of(loader))

    def is_of(self, loader: Iterable[Any]) -> bool:
        """Whether the base in use is, as far as can be told without ids, of the rows that a loader reads.

        Args:
            loader: The loader of a refresh.
        """
        same_dataset = self._dataset is None or self._dataset() is given_dataset_of(loader)
        return same_dataset and self.key in (None, source_key(loader))

    def changes(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        target: Target,
        loader: Iterable[Any],
        base: KnowledgeBase,
    ) -> list[str]:
        """What tells the source that a loader reads from that of a base; of an index the ends are encoded.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            target: Its encoders.
            loader: The loader of a refresh.
            base: The base in use.

        Returns:
            Each difference as `what old → new`; none for the same source.
        """
        if changed := differences(self.key or {}, source_key(loader)):
            return changed
        if has_index(loader) and len(base.fine) == num_items(loader):  # one row for each item
            ends = _ids_at_ends(trainer, module, target, loader)
            for kind, ids, all_stored in zip(
                ("clip", "caption"), ends, (base.ids, base.caption_ids), strict=True
            ):
                stored = None if all_stored is None else all_stored[[0, -1]].tolist()
                if ids is not None and stored is not None and ids != stored:
                    return [f"{kind} ids of the first and last row {stored} → {ids}"]
        return []

    def changes_beside(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        target: Target,
        loader: Iterable[Any],
        clips: StoredClips,
    ) -> list[str]:
        """What tells the training data that a loader reads from those that were encoded beside a source.

        Args:
            trainer: The running trainer.
            module: The module that it trains.
            target: Its encoders.
            loader: The loader of a refresh.
            clips: The clips of the earlier training data.

        Returns:
            Each difference in words; none for the same data.
        """
        if changed := differences(self.key or {}, source_key(loader)):
            return changed
        ids = _ids_at_ends(trainer, module, target, loader)[0] if has_index(loader) else None
        if ids is None or set(ids) <= set(clips.ids.tolist()):
            return []
        return [f"clip ids of the first and the last item {ids} are not among them"]


def check_ranks_share_source(
    trainer: pl.Trainer, module: pl.LightningModule, target: Target, loader: Iterable[Any]
) -> None:
    """Refuse a source with an index of which each rank has a part of its own; collective.

    Args:
        trainer: The running trainer.
        module: The module that it trains.
        target: Its encoders.
        loader: The loader of this rank's items.

    Raises:
        RuntimeError: Ranks have different rows, or one of them cannot encode its own.
    """
    ranks = Ranks.current()
    if ranks.size == 1 or not has_index(loader):
        return
    with (
        nullcontext()
        if is_sharded(trainer)
        else ranks.all_or_none("encoding its part of the knowledge source")
    ):
        ids, _ = _ids_at_ends(trainer, module, target, loader)
    parts = ranks.all_gather_object((source_key(loader)["selection"], ids))
    if any(part != parts[0] for part in parts):
        ends = ", ".join(f"rank {rank}: {ids}" for rank, (_, ids) in enumerate(parts) if ids is not None)
        told = f" (clip ids of the first and the last: {ends})" if ends else ""
        raise RuntimeError(
            f"Each rank has rows of its own in the knowledge source{told}, but a map-style dataset is "
            "divided among the ranks by the refresh, so it has to be the whole one on all of them. Pass "
            "it: KnowledgeRefreshCallback(source=dataset)."
        )


def differences(stored: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The entries that have changed, as `name old → new`.

    Args:
        stored: Entries of a checkpoint, perhaps not all of them.
        present: All entries as they are now.

    Examples:
        >>> differences({"items": 3}, {"items": 4, "selection": None})
        ['items 3 → 4']
    """
    return [
        f"{name} {value!r} → {present[name]!r}" for name, value in stored.items() if value != present[name]
    ]


def _ids_at_ends(
    trainer: pl.Trainer, module: pl.LightningModule, target: Target, loader: Iterable[Any]
) -> tuple[list[int] | None, list[int] | None]:
    """Clip ids and caption ids of the first and last item of a source with an index; `None` without ids."""
    items = num_items(loader)
    if not items or getattr(loader, "batch_size", None) is None:
        return None, None
    dataset: Any = loader.dataset  # type: ignore[attr-defined]
    probe = source_loader(Subset(dataset, [0, items - 1]), loader)
    # Where each forward pass needs all ranks, they also learn in the encoding which of them has failed.
    ranks = Ranks.current() if is_sharded(trainer) else Ranks()
    ends = encode_source(trainer, module, probe, target.embed, ranks=ranks)
    ids, captions = (None if found is None else found.tolist() for found in (ends.ids, ends.caption_ids))
    return ids, captions
