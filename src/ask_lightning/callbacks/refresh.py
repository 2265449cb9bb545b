"""`KnowledgeRefreshCallback`: builds the knowledge base and renews it every T epochs (paper 4.4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import Subset

from ask_lightning.callbacks.loss_terms import log_loss_terms
from ask_lightning.callbacks.progress import progress_bar
from ask_lightning.callbacks.snapshots import (
    SnapshotCollector,
    SnapshotRecord,
    SnapshotRestorer,
    SnapshotWriter,
    checkpoint_directories,
    knowledge_directory,
    local_path,
)
from ask_lightning.encoding.compatibility import (
    check_finders,
    check_gradients,
    check_trainer,
    warn_of_single_pair,
)
from ask_lightning.encoding.encode import Encoded, encode_source
from ask_lightning.encoding.isolation import preserved_random_state
from ask_lightning.encoding.loss_binding import check_borrowed_parameters
from ask_lightning.encoding.row_limit import RowLimit, limiting_option, rows_of_an_epoch
from ask_lightning.encoding.sharding import average_whole_gradients, is_sharded
from ask_lightning.encoding.source_identity import dataset_of, source_key, weak_reference
from ask_lightning.encoding.source_loader import (
    Source,
    batch_size_of,
    has_index,
    num_items,
    source_loader,
)
from ask_lightning.encoding.target import Target, find_target
from ask_lightning.functional import unit_length
from ask_lightning.knowledge.base import (
    PLACEMENTS,
    STORAGES,
    KnowledgeBase,
    Placement,
    Storage,
    check_embeddings,
)
from ask_lightning.knowledge.kmeans import CLUSTERINGS, Clustering
from ask_lightning.knowledge.prototypes import PAIRINGS, PrototypePairing
from ask_lightning.knowledge.refinement import GraphRefinement
from ask_lightning.knowledge.snapshot_file import SnapshotError
from ask_lightning.knowledge.stored_clips import StoredClips
from ask_lightning.utilities.arguments import check_choice, check_count, check_fraction
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.faiss_import import import_faiss

# Mean cosine between embeddings above which they hardly distinguish anything.
_COLLAPSED = 0.95
# RDM scores each query against every row of both bases; a mean over this many is exact enough to plot.
_DRIFT_QUERIES = 1024


class KnowledgeRefreshCallback(Callback):
    """Encodes the knowledge source before the first step and again whenever `epoch % T == 0`.

    The source is read by a loader of its own and encoded by the current encoders in evaluation mode, without
    gradient. Random streams, training modes, logs and the order of training batches stay what they would
    be without it. On several ranks each encodes its share; all end with the same base, which is checked by a
    fingerprint.

    References:
        ASK, arXiv 2512.19703 version 2, section 4.4 (the paper's 𝒯 is `T`).

    Requirements:
        An `ASKModule`, or a module with a loss of `ask_lightning.losses` and the methods
        that `ask_lightning.encoding.target.find_target` names. The source's items pass through the training
        loader's collation unless the source is a loader itself.

    Recommendations:
        The callback cannot see augmentation inside the dataset: pass `source=` a dataset without it.

    Args:
        T: Number of epochs from one refresh to the next, at least 1. From `max_epochs` on the base is never
            renewed, the paper's "static" ablation.
        source: The knowledge source: `None` for the trainer's training data, or a Dataset, a DataLoader, or a
            callable that returns one. Datasets with a method `without_random_crops` are read through it.
        num_prototypes: M, the number of coarse prototypes, at least 1.
        prototype_pairing: How audio and text clusters become pairs: `"matched"`, `"joint"`, `"audio"`,
            `"text"` or `"index"`, see `ask_lightning.knowledge.prototypes.build_prototypes`.
        normalize_prototypes: Whether to bring max-pooled prototypes back to unit length. The paper's Eq. 8
            does not; without it they are longer than one, and the modulation factor may fall to 0.
        clustering: The kind of K-means that makes the prototypes: `"spherical"`, or `"euclidean"` as
            `faiss.Kmeans` does it, see `ask_lightning.knowledge.kmeans.kmeans`.
        index: The kind of search: `"auto"`, `"exact"` or a Faiss factory string.
        placement: `"replicated"`: every rank holds the base. `"sharded"`: every rank holds its shard, for
            sources that do not fit into one device; each step then exchanges queries and neighbours.
        storage: The dtype of the base: `"float32"`, or `"float16"` or `"bfloat16"`, which halve its memory;
            scores are float32 in any case.
        momentum: m in [0, 1), the share of the stored embeddings that a refresh keeps: it stores
            unit(m · old + (1 - m) · new), row by row. 0 stores the new embeddings, as the paper does. Above
            0 the source needs an index.
        refine: `"graph"` or a `GraphRefinement` with settings of its own: what is stored is mixed with its
            nearest stored pairs. None: it is stored as it is.
        batch_size: Number of pairs per batch of a refresh; default: that of the loader.
        num_workers: Number of worker processes of a refresh; default: that of the loader.
        max_rows: Number of pairs, over all ranks, that a refresh reads at most: the first of the source, and
            the way to take knowledge from a stream that does not end. Default: all of them, unless
            `fast_dev_run` or, for the training data, `limit_train_batches` makes the trainer read less.
        save_knowledge: Whether to write the base beside the checkpoints, so that a resumed run continues with
            the very knowledge that it had. Snapshots that no checkpoint needs any more are removed.
        seed: Seed of the K-means initialisation.

    Raises:
        ValueError: An argument out of range.
        RuntimeError: At the start of `fit`, where ASK cannot train.

    Examples:
        >>> KnowledgeRefreshCallback(T=15, num_prototypes=64).T
        15
    """

    def __init__(
        self,
        T: int = 15,
        source: Source | Callable[[], Source] | None = None,
        *,
        num_prototypes: int = 512,
        prototype_pairing: PrototypePairing = "matched",
        normalize_prototypes: bool = True,
        clustering: Clustering = "spherical",
        index: str = "auto",
        placement: Placement = "replicated",
        storage: Storage = "float32",
        momentum: float = 0.0,
        refine: Literal["graph"] | GraphRefinement | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        max_rows: int | None = None,
        save_knowledge: bool = True,
        seed: int = 0,
    ) -> None:
        check_count("T", T, 1)
        check_count("num_prototypes", num_prototypes, 1)
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
        if num_workers is not None:
            check_count("num_workers", num_workers, 0)
        if max_rows is not None:
            check_count("max_rows", max_rows, 1)
        check_choice("prototype_pairing", prototype_pairing, PAIRINGS)
        check_choice("clustering", clustering, CLUSTERINGS)
        check_choice("placement", placement, PLACEMENTS)
        check_choice("storage", storage, STORAGES)
        check_fraction("momentum", momentum)
        if isinstance(refine, str):
            check_choice("refine", refine, ("graph",))
        self.T = T
        self.source = source
        self.num_prototypes = num_prototypes
        self.prototype_pairing: PrototypePairing = prototype_pairing
        self.normalize_prototypes = normalize_prototypes
        self.clustering: Clustering = clustering
        self.index = index
        self.placement: Placement = placement
        self.storage: Storage = storage
        self.momentum = float(momentum)
        self.refine = GraphRefinement() if refine == "graph" else refine
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_rows = max_rows
        self.save_knowledge = save_knowledge
        self.seed = seed
        self._target: Target | None = None
        self._built_at: int | None = None  # the epoch whose encoders made the base in use
        self._snapshots = SnapshotRecord()
        self._collector = SnapshotCollector(self._snapshots)
        self._warned_of_collapse = False
        self._checked_gradients = False
        self._to_restore: dict[str, Any] | None = None
        self._source_key: dict[str, Any] | None = None  # of the base in use
        self._dataset: Callable[[], object] | None = None  # a weak reference to that of the base in use
        self._told_limit = False

    @property
    def target(self) -> Target:
        """The loss that looks the knowledge up and the encoders; known from the start of `fit` on."""
        if self._target is None:
            raise RuntimeError("KnowledgeRefreshCallback knows its module from the start of `fit` on.")
        return self._target

    @property
    def _needs_training_clips(self) -> bool:
        """Whether a refresh encodes the training clips beside the source."""
        return self.source is not None and self.target.loss.needs_training_clips

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that ASK can train this module with this trainer."""
        if stage != "fit":
            return
        check_trainer(trainer, pl_module)
        check_finders(trainer)
        if self.index not in ("auto", "exact"):
            import_faiss()  # an index that cannot be built is an error before the source is encoded
        self._target = find_target(pl_module)
        if not self.target.loss.needs_knowledge:
            rank_zero_warn(
                f"{type(self.target.loss).__name__} needs no knowledge, so KnowledgeRefreshCallback encodes "
                "the source for the monitors alone. Leave it out to save the time."
            )
        if trainer.current_epoch == 0:
            # A new run, perhaps after another one with the same objects.
            self._built_at = self._to_restore = self.target.loss.knowledge = None
            self._snapshots = SnapshotRecord()
            self._collector = SnapshotCollector(self._snapshots)
            self._warned_of_collapse = self._checked_gradients = self._told_limit = False
            self._source_key = self._dataset = None
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.T:
            rank_zero_warn(
                f"KnowledgeRefreshCallback(T={self.T}) with max_epochs={trainer.max_epochs} builds the "
                "knowledge once and never renews it. Lower T to follow the encoders."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the base that a resumed run had in use, and checks that its source is still the same."""
        self._snapshots.checkpoint_directories = set(checkpoint_directories(trainer))
        self._snapshots.root = local_path(trainer.default_root_dir)
        warn_of_single_pair(trainer)
        check_borrowed_parameters(trainer, pl_module, self.target.loss)
        self._restore(trainer, pl_module)
        if self.target.loss.knowledge is not None and self._built_at is not None:
            self._check_source(trainer, pl_module)

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the base that a checkpoint names."""
        state, self._to_restore = self._to_restore, None
        if state is None or state["built_at"] is None:
            return
        ranks = Ranks.current()
        directory = Path(trainer.ckpt_path).absolute().parent if trainer.ckpt_path else None
        try:
            restorer = SnapshotRestorer(self._snapshots)
            base = restorer.restore(state, directory, ranks, sharded=self.placement == "sharded")
            if self._needs_training_clips and base.training_clips is None:
                raise SnapshotError("It lacks the training clips, which the loss needs beside the source.")
        except SnapshotError as error:
            # A trainer that crashed and is used again still holds the base of its last epoch.
            self.target.loss.knowledge = self._built_at = None
            rank_zero_warn(
                f"The run resumes with newly encoded knowledge instead of that of epoch {state['built_at']}, "
                f"so its losses differ from those of a run without a break. {error}"
            )
            return
        self.target.loss.knowledge = base.to(pl_module.device)
        self._built_at = state["built_at"]
        self._source_key = state.get("source")
        settings, stored = self._settings(), state.get("settings", {})
        changed = [
            f"{name} {value!r} → {settings[name]!r}"
            for name, value in stored.items()
            if value != settings[name]
        ]
        if changed:
            rank_zero_warn(
                f"The run resumes with knowledge that was built with other settings: {', '.join(changed)}. "
                "The new ones take effect at the next refresh."
            )

    def _check_source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops the base of another source than the present one, so that it is built anew."""
        base, loader = self.target.loss.knowledge, self.loader(trainer)
        assert base is not None
        present, stored = source_key(loader), self._source_key or {}
        changed = [
            f"{name} {value} → {present[name]}" for name, value in stored.items() if value != present[name]
        ]
        one_row_per_item = has_index(loader) and len(base.fine) == num_items(loader)
        if not changed and one_row_per_item and getattr(loader, "batch_size", None) is not None:
            dataset: Any = loader.dataset  # type: ignore[attr-defined]
            ends = [0, len(base.fine) - 1]
            probe = source_loader(Subset(dataset, ends), loader)
            ids = encode_source(trainer, pl_module, probe, self.target.embed).ids
            if ids is not None and not torch.equal(ids.cpu(), base.ids[ends].cpu()):
                changed = [f"clip ids of the first and last row {base.ids[ends].tolist()} → {ids.tolist()}"]
        if changed:
            rank_zero_warn(
                f"The knowledge source is another one than that of the knowledge in use "
                f"({', '.join(changed)}), so the knowledge is encoded anew."
            )
            self.target.loss.knowledge = self._built_at = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refreshes the knowledge if it is due."""
        self._refresh_if_due(trainer, pl_module)
        assert self._built_at is not None
        self._collector.collect()
        if not trainer.barebones:
            pl_module.log(
                "ask/knowledge_age",
                float(trainer.current_epoch - self._built_at),
                batch_size=1,
                sync_dist=True,
            )

    def _refresh_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refreshes the knowledge if this epoch asks for it, or if there is none."""
        epoch = trainer.current_epoch
        due = epoch % self.T == 0 and self._built_at != epoch
        if due or self.target.loss.knowledge is None:
            self.refresh(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the snapshots that the last checkpoints do not need."""
        self._collector.collect()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks once which parameters have no gradient: DDP refuses them, one device is silent."""
        average_whole_gradients(trainer, pl_module)
        if not self._checked_gradients:
            self._checked_gradients = check_gradients(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes the knowledge after a resume at which Lightning leaves out `on_train_epoch_start`."""
        self._refresh_if_due(trainer, pl_module)
        if not is_sharded(trainer):  # there is no value outside of the forward pass
            self.target.loss.check_temperature(batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the step's loss, where they are read."""
        terms, self.target.loss.last = self.target.loss.last, {}
        log_loss_terms(trainer, pl_module, terms)

    def refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encode the source with the current encoders and put the new base in place of the old one.

        If anything fails or is interrupted the old base stays in use.

        Args:
            trainer: The running trainer.
            pl_module: Its module.

        Raises:
            ValueError: The source is empty, embeddings contain NaN or Inf, or the loss asks for more
                neighbours than the base has.
            RuntimeError: The source is a stream that does not end.
        """
        started = time.perf_counter()
        ranks = Ranks.current()
        with ranks.all_or_none("opening the knowledge source"):
            loader = self.loader(trainer)
            loaders = [loader]
            if self._needs_training_clips:
                loaders.append(self._open(None, trainer))
            if self.momentum and not has_index(loader):
                raise ValueError(
                    f"KnowledgeRefreshCallback(momentum={self.momentum}) mixes old and new embeddings of the "
                    f"same rows, but the source {type(getattr(loader, 'dataset', loader)).__name__} has no "
                    "index by which to find them. Pass a map-style dataset, or leave `momentum` out."
                )
        with progress_bar(trainer, "Refreshing knowledge", _num_batches(loaders)) as advance:
            encoded, *of_training = (
                encode_source(trainer, pl_module, each, self.target.embed, advance, ranks=ranks, limit=limit)
                for each, limit in zip(loaders, self._row_limits(trainer, loaders), strict=True)
            )
        is_same_source = self._is_of_same_source(loader)
        audio, text = self._keep_momentum(encoded, is_same_source=is_same_source)
        if self.refine is not None:
            check_embeddings(audio, text, encoded.shard)
            audio, text = self.refine(audio, text, encoded.shard)
        base = KnowledgeBase.from_embeddings(
            audio,
            text,
            ids=encoded.ids,
            num_prototypes=self.num_prototypes,
            prototype_pairing=self.prototype_pairing,
            normalize_prototypes=self.normalize_prototypes,
            clustering=self.clustering,
            index=self.index,
            seed=self.seed,
            storage=self.storage,
            placement=self.placement,
            shard=encoded.shard,
            training_clips=self._training_clips(*of_training),
        )
        self.target.loss.check_knowledge(base)
        old, self.target.loss.knowledge = self.target.loss.knowledge, base
        self._source_key, self._dataset = source_key(loader), weak_reference(dataset_of(loader))
        self._built_at = trainer.current_epoch
        self._snapshots.supersede()
        seconds = time.perf_counter() - started
        report: dict[str, Any] = {"refresh_seconds": seconds, "pairs_per_second": len(base.fine) / seconds}
        report |= (similarity := mean_similarity(base))
        if old is not None:
            self._warned_of_collapse = self._warned_of_collapse or self._warn_of_collapse(similarity)
            same_ids = torch.equal(base.ids, old.ids) if encoded.ids is not None else is_same_source
            if has_index(loader) and base.has_same_rows_as(old) and same_ids:
                report |= knowledge_drift(base, old)
        if not trainer.barebones:
            values = {f"ask/{name}": value for name, value in report.items()}
            pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _is_of_same_source(self, loader: Iterable[Any]) -> bool:
        """Whether the base in use is, as far as can be told without ids, of the rows that a loader reads."""
        same_dataset = self._dataset is None or self._dataset() is dataset_of(loader)
        return same_dataset and self._source_key in (None, source_key(loader))

    def _keep_momentum(self, encoded: Encoded, *, is_same_source: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings `(n, d)` to store: the new ones, mixed with the old ones of the same rows.

        Args:
            encoded: The new embeddings.
            is_same_source: Whether they are of the dataset of the old ones, which decides where there are no
                ids.
        """
        new = encoded.audio, encoded.text
        old = self.target.loss.knowledge
        if old is None or not self.momentum:
            return new
        same_rows = len(old.fine) == encoded.shard.num_rows and old.width == encoded.audio.shape[1]
        if encoded.ids is None:
            same_rows = same_rows and is_same_source
        elif same_rows:
            ids = encoded.shard.gather(encoded.ids.to(old.device))
            same_rows = torch.equal(ids, old.ids)
        if not same_rows:
            rank_zero_warn(
                f"The knowledge source changed since the last refresh ({len(old.fine)} pairs then, "
                f"{encoded.shard.num_rows} now), so this refresh stores the new embeddings only. If it is "
                "a new dataset of the same pairs, pass their clip ids, by which they are known again: "
                "ASKModule(..., ids=...)."
            )
            return new
        stored = old.fine.pairs(encoded.shard.global_rows().to(old.device))
        audio, text = (
            self.momentum * before.to(now) + (1 - self.momentum) * unit_length(now)
            for before, now in zip(stored, new, strict=True)
        )
        return audio, text

    def _warn_of_collapse(self, similarity: dict[str, torch.Tensor]) -> bool:
        """Warn if the embeddings of both modalities have collapsed; whether they have."""
        audio, text = (float(value) for value in similarity.values())
        collapsed = min(audio, text) > _COLLAPSED
        if collapsed:
            rank_zero_warn(
                f"The embeddings have collapsed: the mean cosine between source pairs is {audio:.3f} for "
                f"audio and {text:.3f} for text. {self.target.loss.against_collapse}"
            )
        return collapsed

    def _training_clips(self, encoded: Encoded | None = None) -> StoredClips | None:
        """The training clips, encoded beside a source of other pairs; held by every rank."""
        if encoded is None:
            return None
        check_embeddings(encoded.audio, encoded.text, encoded.shard)
        assert encoded.ids is not None
        audio, text = (encoded.shard.gather(unit_length(side)) for side in (encoded.audio, encoded.text))
        clips = StoredClips.of_rows(audio, text, encoded.shard.gather(encoded.ids.to(audio.device)))
        old = self.target.loss.knowledge
        if old is None or old.training_clips is None or not self.momentum:
            return clips
        return clips.blend(old.training_clips, self.momentum)

    def loader(self, trainer: pl.Trainer) -> Iterable[Any]:
        """Make a new loader over this rank's items of the source, in order.

        Args:
            trainer: The running trainer, whose training data are the default source.
        """
        return self._open(self.source, trainer)

    def _open(self, source: object, trainer: pl.Trainer) -> Iterable[Any]:
        """Make a new loader over this rank's items of a source; `None` is the training data."""
        with preserved_random_state():  # a callable that makes the source may draw
            return source_loader(
                source,
                trainer.train_dataloader,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                ranks=Ranks.current(),
                max_items=self.max_items(trainer, is_training_data=source is None),
            )

    def max_items(self, trainer: pl.Trainer, *, is_training_data: bool | None = None) -> int | None:
        """Number of items of the source that a refresh reads at most, over all ranks; `None` for all.

        Args:
            trainer: The running trainer.
            is_training_data: Whether the source is the training data. None: that of this callback.
        """
        if is_training_data is None:
            is_training_data = self.source is None
        limits = [] if self.max_rows is None else [self.max_rows]
        option = limiting_option(trainer, is_training_data=is_training_data)
        size = batch_size_of(trainer.train_dataloader)
        if option is not None and size is not None:
            visited = int(trainer.num_training_batches) * size * Ranks.current().size
            # Enough for a lookup, and for one that leaves the query's own clip out.
            limits.append(max(visited, 2 * getattr(self.target.loss, "num_neighbors", 1)))
            if not self._told_limit:
                self._told_limit = True
                rank_zero_warn(
                    f"With {option} a refresh reads {limits[-1]} pairs of the knowledge source, if it has so "
                    "many. To have all of the training data in the knowledge, pass them: "
                    "KnowledgeRefreshCallback(source=dataset)."
                )
        return min(limits, default=None)

    def _row_limits(self, trainer: pl.Trainer, loaders: list[Iterable[Any]]) -> list[RowLimit]:
        """What this rank reads of sources whose items cannot be counted beforehand."""
        size = batch_size_of(trainer.train_dataloader)
        visited = rows_of_an_epoch(trainer, size)
        limits = []
        for number, loader in enumerate(loaders):
            is_training_data = number > 0 or self.source is None
            most = self.max_items(trainer, is_training_data=is_training_data)
            option = limiting_option(trainer, is_training_data=is_training_data)
            batches = int(trainer.num_training_batches) if option and size is None else None
            is_counted = has_index(loader) and getattr(loader, "batch_size", None) is not None
            take = None if most is None or is_counted else -(-most // Ranks.current().size)
            limits.append(RowLimit(take, batches, visited))
        return limits

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the base in use, once, before the first checkpoint that depends on it."""
        base = self._target.loss.knowledge if self._target else None
        if base is None or self._built_at is None:
            return
        if self.save_knowledge:
            SnapshotWriter(self._snapshots).write(base, self._built_at, knowledge_directory(trainer))
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The epoch of the base in use and the snapshot that holds it."""
        base = self._target.loss.knowledge if self._target else None
        return {
            "built_at": self._built_at,
            **self._snapshots.state(),
            "fingerprint": base.fingerprint if base is not None else None,
            "settings": self._settings(),
            "source": self._source_key,
        }

    def _settings(self) -> dict[str, Any]:
        """The arguments that the content of the base depends on."""
        names = (
            "num_prototypes",
            "prototype_pairing",
            "normalize_prototypes",
            "clustering",
            "index",
            "storage",
        )
        settings = {name: getattr(self, name) for name in (*names, "momentum", "seed", "max_rows")}
        return settings | {"refine": None if self.refine is None else asdict(self.refine)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts, when devices are known."""
        self._to_restore = state_dict


def find_refresher(trainer: pl.Trainer, wanted_by: Callback) -> KnowledgeRefreshCallback:
    """Find the callback that refreshes the knowledge.

    Args:
        trainer: The trainer to search.
        wanted_by: The callback that needs it, for the error message.

    Returns:
        The refresh callback.

    Raises:
        RuntimeError: The trainer has none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, KnowledgeRefreshCallback):
            return callback
    raise RuntimeError(
        f"{type(wanted_by).__name__} needs the knowledge of a KnowledgeRefreshCallback, but the trainer has "
        "none. Add it to the callbacks."
    )


def knowledge_drift(current: KnowledgeBase, stored: KnowledgeBase) -> dict[str, torch.Tensor]:
    """RDM of each modality between two bases of the same rows, over evenly spaced queries.

    Args:
        current: The base that the current encoders made.
        stored: The base that older encoders made.

    Returns:
        The drifts `rdm_audio` and `rdm_text`, 0-d.
    """
    rows = len(current.fine)
    queries = torch.linspace(0, rows - 1, min(rows, _DRIFT_QUERIES), device=current.device).long()
    drifts = current.fine.drift_from(stored.fine, queries)
    return dict(zip(("rdm_audio", "rdm_text"), drifts, strict=True))


def mean_similarity(base: KnowledgeBase) -> dict[str, torch.Tensor]:
    """Mean cosine between all rows of each modality: near 0 if they are spread out, 1 if they are all equal.

    Args:
        base: The base to examine.

    Returns:
        The means `mean_similarity_audio` and `mean_similarity_text`, 0-d.
    """
    # The mean of all u_i · u_j is the squared length of the mean.
    audio, text = (mean.square().sum() for mean in base.fine.mean)
    return {"mean_similarity_audio": audio, "mean_similarity_text": text}


def _num_batches(loaders: Iterable[object]) -> int | None:
    """The length of all loaders together, if each has one."""
    try:
        return sum([len(loader) for loader in loaders])  # type: ignore[arg-type, misc]
    except TypeError:  # no length, or that of a DataLoader over an iterable dataset
        return None
