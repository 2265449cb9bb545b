"""`KnowledgeRefreshCallback`: builds the knowledge base and renews it while a model trains (paper 4.4)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from ask_lightning.callbacks.auto_period import AutoPeriod, AutoSchedule
from ask_lightning.callbacks.background_refresh import BackgroundRefresh, check_background
from ask_lightning.callbacks.background_slot import BackgroundSlot
from ask_lightning.callbacks.base_builder import BaseBuilder
from ask_lightning.callbacks.epoch_start import begin_epoch_with_all_batches
from ask_lightning.callbacks.known_clips import KnownClips
from ask_lightning.callbacks.known_source import KnownSource, check_ranks_share_source, differences
from ask_lightning.callbacks.loader_state import warn_of_inexact_resume
from ask_lightning.callbacks.loss_terms import log_loss_terms, log_own
from ask_lightning.callbacks.random_state import RandomStateCallback
from ask_lightning.callbacks.refresh_options import (
    MODES,
    Mode,
    check_combination,
    mode_option,
    row_finding_option,
)
from ask_lightning.callbacks.refresh_report import RefreshReport
from ask_lightning.callbacks.refresh_source import SourceReader
from ask_lightning.callbacks.renewal import Renewal, Renewer
from ask_lightning.callbacks.row_ages import RowAges
from ask_lightning.callbacks.snapshots import (
    SnapshotCollector,
    SnapshotRecord,
    SnapshotRestorer,
    SnapshotWriter,
    checkpoint_directories,
    knowledge_directory,
    local_path,
)
from ask_lightning.callbacks.step_rows import StepRows
from ask_lightning.encoding.compatibility import (
    check_finders,
    check_trainer,
    warn_of_single_pair,
    warn_of_uneven_batches,
)
from ask_lightning.encoding.gradient_check import GradientCheck
from ask_lightning.encoding.isolation import restore_in_checkpoint
from ask_lightning.encoding.loss_binding import check_borrowed_parameters
from ask_lightning.encoding.sharding import average_whole_gradients, is_sharded
from ask_lightning.encoding.source_loader import Source
from ask_lightning.encoding.target import Target, find_target
from ask_lightning.knowledge.base_settings import Placement, Storage, check_memmap
from ask_lightning.knowledge.kmeans import Clustering
from ask_lightning.knowledge.mapping import MappedRefresh
from ask_lightning.knowledge.prototypes import PrototypePairing
from ask_lightning.knowledge.refinement import GraphRefinement
from ask_lightning.knowledge.snapshot_file import SnapshotError
from ask_lightning.utilities.arguments import check_choice, check_count
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.faiss_import import import_faiss


class KnowledgeRefreshCallback(Callback):
    """Encodes the knowledge source before the first step, and again whenever `epoch % T == 0`.

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

        A refresh costs a forward pass over the source. Where that is too much, `T="auto"` refreshes only when
        the encoders have moved, `mode="rolling"` spreads it over T epochs, and `write_back=True` stores what
        training steps embed anyway.

    Args:
        T: Number of epochs from one refresh to the next, at least 1. From `max_epochs` on the base is never
            renewed, the paper's "static" ablation. `"auto"`, or an `AutoPeriod` with settings of its own:
            refresh when the rows of the training batches have moved away from what is stored of them. That
            takes clip ids, where clips have several pairs also caption ids, and a lookup of the batch's own
            rows in each step.
        source: The knowledge source: `None` for the trainer's training data, or a Dataset, a DataLoader, or a
            callable that returns one. Datasets with a method `without_random_crops` are read through it. For
            `KnowledgeDistillationLoss` it has to hold the training clips, which are all that is looked up.
        num_prototypes: M, the number of coarse prototypes, at least 1. None is made for a loss that does not
            look them up (`needs_prototypes`).
        prototype_pairing: How audio and text clusters become pairs: `"matched"`, `"joint"`, `"audio"`,
            `"text"` or `"index"`, see `ask_lightning.knowledge.prototypes.build_prototypes`.
        normalize_prototypes: Whether to bring max-pooled prototypes back to unit length. The paper's Eq. 8
            does not; without it they are longer than one, and the modulation factor may fall to 0.
        clustering: The kind of K-means that makes the prototypes: `"spherical"`, or `"euclidean"` as
            `faiss.Kmeans` does it, see `ask_lightning.knowledge.kmeans.kmeans`.
        index: The kind of search: `"auto"`, `"exact"` or a Faiss factory string. `"auto"` is exact in memory
            and suits the number of rows in files; the log says what it has become.
        placement: `"replicated"`: every rank holds the base. `"sharded"`: every rank holds its shard, for
            sources that do not fit into one device; each step then exchanges queries and neighbours.
        storage: The dtype of the base: `"float32"`, or `"float16"` or `"bfloat16"`, which halve its memory;
            scores are float32 in any case, and so is what a teacher reads, the sums of each clip's rows. Or
            `"memmap"`: the embeddings are in files, for knowledge larger than memory, which holds an index
            alone. On several ranks each has the files of its shard, with `placement="sharded"`.
        storage_directory: The directory for the files of `storage="memmap"`, on a local disk with room for
            two bases: 4 d bytes for each pair and base. They are removed with the base, except those that a
            checkpoint's snapshot shares. Default: `knowledge_rows` in the run's own directory.
        momentum: m in [0, 1), the share of the stored embeddings that a refresh keeps: it stores
            unit(m · old + (1 - m) · new), row by row, and of training clips beside a source clip by clip. 0
            stores the new embeddings, as the paper does. Above 0 the source needs an index.
        mode: What a refresh encodes. `"full"`: all rows. `"rolling"`: in each epoch another T-th of the rows,
            so that none is older than T epochs; prototypes are made anew in each epoch. `"mapped"`, or a
            `MappedRefresh` with settings of its own: a tenth of the rows; the others are mapped to where the
            encoders have moved, or all are encoded where no map finds more true neighbours than the old rows.
            Both need a source with an index that has the same number of rows for each item.
        write_back: Whether each training step stores its embeddings over those of its rows, from training
            mode, with their dropout and augmentation. That takes clip ids, where clips have several pairs
            also caption ids, and one exchange of embeddings between ranks in each step, and each checkpoint
            writes the knowledge. Prototypes, and rows that no step has seen, stay as they are until the next
            refresh.
        refine: `"graph"` or a `GraphRefinement` with settings of its own: what is stored is mixed with its
            nearest stored pairs, the training data beside a source among themselves. None: it is stored as it
            is.
        in_background: Whether refreshes after the first one encode while training goes on: a copy of the
            encoders, as they are when the refresh is due, encodes in a thread, and the new base is used from
            the beginning of the next epoch on, which waits if it has to. Knowledge is an epoch older for it.
            The copy takes the memory of the weights; on a CPU, whose cores both share, little is gained.
        batch_size: Number of pairs per batch of a refresh; default: that of the loader.
        num_workers: Number of worker processes of a refresh; default: that of the loader. With
            `in_background` at least 1.
        max_rows: Number of pairs, over all ranks, that a refresh reads at most: the first of the source, and
            the way to take knowledge from a stream that does not end. Where collation makes several pairs of
            an item of a dataset with an index, it is the number of items. Training clips that a loss learns
            from beside another source are all read, unless they are a stream, too. Default: all of them,
            unless `fast_dev_run` or, for the training data, `limit_train_batches` lets the trainer read less.
        save_knowledge: Whether to write the base beside the checkpoints, so that a resumed run continues with
            the very knowledge that it had. Snapshots that no checkpoint needs any more are removed.
        seed: Seed of the K-means initialisation.

    Attributes:
        schedule: What decides with `T="auto"`; `None` with a number.
        num_encoded: Number of pairs that refreshes have encoded, over all ranks, in this part of the run.
        num_written: Number of pairs that steps have written back, the same.

    Raises:
        ValueError: An argument out of range, or options that exclude each other.
        RuntimeError: At the start of `fit`, where ASK cannot train; with `T="auto"` or `write_back` later,
            where the knowledge has none of the pairs of the batches, or two with one clip id and one caption
            id; with `write_back` also where it has several pairs of a clip and captions have no ids.

    Examples:
        >>> KnowledgeRefreshCallback(T=15, num_prototypes=64).T
        15
    """

    def __init__(
        self,
        T: int | Literal["auto"] | AutoPeriod = 15,
        source: Source | Callable[[], Source] | None = None,
        *,
        num_prototypes: int = 512,
        prototype_pairing: PrototypePairing = "matched",
        normalize_prototypes: bool = True,
        clustering: Clustering = "spherical",
        index: str = "auto",
        placement: Placement = "replicated",
        storage: Storage = "float32",
        storage_directory: str | Path | None = None,
        momentum: float = 0.0,
        mode: Mode | MappedRefresh = "full",
        write_back: bool = False,
        refine: Literal["graph"] | GraphRefinement | None = None,
        in_background: bool = False,
        batch_size: int | None = None,
        num_workers: int | None = None,
        max_rows: int | None = None,
        save_knowledge: bool = True,
        seed: int = 0,
    ) -> None:
        if T != "auto" and not isinstance(T, AutoPeriod):
            check_count("T", T, 1)
        if batch_size is not None:
            check_count("batch_size", batch_size, 1)
        if num_workers is not None:
            check_count("num_workers", num_workers, 1 if in_background else 0)
        if max_rows is not None:
            check_count("max_rows", max_rows, 1)
        if not isinstance(mode, MappedRefresh):
            check_choice("mode", mode, MODES)
        if isinstance(refine, str):
            check_choice("refine", refine, ("graph",))
        self.T = AutoPeriod() if isinstance(T, str) else T
        self.source = source
        self.storage_directory = storage_directory
        self.mode: Literal["full", "rolling"] | MappedRefresh = MappedRefresh() if mode == "mapped" else mode
        self.write_back = write_back
        self.in_background = in_background
        self.max_rows = max_rows
        self.save_knowledge = save_knowledge
        self._builder = BaseBuilder(
            num_prototypes=num_prototypes,
            prototype_pairing=prototype_pairing,
            normalize_prototypes=normalize_prototypes,
            clustering=clustering,
            index=index,
            placement=placement,
            storage=storage,
            momentum=momentum,
            refine=GraphRefinement() if refine == "graph" else refine,
            seed=seed,
        )
        self._known_renewer: Renewer | None = None
        self._reader = SourceReader(source, batch_size, num_workers, max_rows)
        self._step_rows: StepRows | None = None  # while training, where an option finds rows
        self._start_anew()
        check_combination(
            self._builder,
            T=self.T,
            mode=self.mode,
            write_back=write_back,
            in_background=in_background,
            storage_directory=storage_directory,
        )

    def _start_anew(self) -> None:
        """Forgets what a run has come to."""
        self._built_at: int | None = None  # the epoch whose encoders made the base in use
        self._snapshots = SnapshotRecord()
        self._collector = SnapshotCollector(self._snapshots)
        self._to_restore: dict[str, Any] | None = None
        self._known_source = KnownSource()
        self._known_training_data = KnownSource()  # where they are encoded beside a source
        self._ages: RowAges | None = None  # where rows may be of different ages
        self.schedule = AutoSchedule(self.T) if isinstance(self.T, AutoPeriod) else None
        self._decided_at: int | None = None  # the last epoch for which the schedule was asked
        self._background = BackgroundSlot()
        self.num_encoded = self.num_written = 0
        self._report = RefreshReport(tells_search=self._builder.index == "auto")
        self._gradient_check = GradientCheck()
        self._known_clips = KnownClips()
        self._reader.restart()

    @property
    def _keeps_ages(self) -> bool:
        """Whether rows may be of different ages."""
        return self.write_back or self.mode != "full"

    @property
    def target(self) -> Target:
        """The loss that looks the knowledge up and the encoders; known from the start of `fit` on."""
        return self._renewer.target

    @property
    def _renewer(self) -> Renewer:
        """What makes new knowledge for the module."""
        if self._known_renewer is None:
            raise RuntimeError("KnowledgeRefreshCallback knows its module from the start of `fit` on.")
        return self._known_renewer

    @property
    def _finds_rows_for(self) -> str | None:
        """The option that finds rows by their clip ids, as it is written."""
        return row_finding_option(self.T, self.write_back)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that ASK can train this module with this trainer."""
        if stage != "fit":
            return
        check_trainer(trainer, pl_module)
        check_finders(trainer)
        if self.in_background:
            check_background(trainer)
        if self._builder.index not in ("auto", "exact"):
            import_faiss()  # an index that cannot be built is an error before the source is encoded
        if self._builder.storage == "memmap":
            check_memmap(self._builder.prototype_pairing, self._builder.placement, trainer.world_size)
        self._known_renewer = Renewer(
            find_target(pl_module),
            self._builder,
            self._reader,
            self.mode,
            self.T,
            self._finds_rows_for,
            self.storage_directory,
        )
        if not self.target.loss.needs_knowledge:
            rank_zero_warn(
                f"{type(self.target.loss).__name__} needs no knowledge, so KnowledgeRefreshCallback encodes "
                "the source for the monitors alone. Leave it out to save the time."
            )
        if trainer.current_epoch == 0:
            # A new run, perhaps after another one with the same objects.
            if self.target.loss.knowledge is not None and self._built_at is None:
                rank_zero_info(
                    "KnowledgeRefreshCallback makes new knowledge in place of that in `loss.knowledge`. To "
                    "train with the latter, leave the callback out."
                )
            self.target.loss.knowledge = None
            self._start_anew()
        if self._renewer.needs_training_clips and (self.write_back or self.mode != "full"):
            option = "write_back=True" if self.write_back else mode_option(self.mode)
            raise RuntimeError(
                f"KnowledgeRefreshCallback({option}) renews rows of the source, but "
                f"{type(self.target.loss).__name__} learns from the training clips beside it. Leave `source` "
                "out, so that the training data are the source."
            )
        never_renewed = self.mode == "full" and not self.write_back and isinstance(self.T, int)
        if never_renewed and trainer.max_epochs is not None and 0 <= trainer.max_epochs <= self.T:  # type: ignore[operator]
            rank_zero_warn(
                f"KnowledgeRefreshCallback(T={self.T}) with max_epochs={trainer.max_epochs} builds the "
                "knowledge once and never renews it. Lower T to follow the encoders."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the base that a resumed run had in use, and checks that its source is still the same."""
        self._snapshots.checkpoint_directories = set(checkpoint_directories(trainer))
        self._snapshots.root = local_path(trainer.default_root_dir)
        warn_of_single_pair(trainer)
        warn_of_uneven_batches(trainer, Ranks.current())
        check_borrowed_parameters(trainer, pl_module, self.target.loss)
        self._gradient_check.start(trainer, pl_module)
        warn_of_inexact_resume(trainer)
        self._restore(trainer, pl_module)
        if self.target.loss.knowledge is not None and self._built_at is not None:
            self._check_source(trainer, pl_module)
        self._look_at_steps()
        self._background.resume(trainer, pl_module, self._renewer, in_background=self.in_background)
        if self.schedule is not None:
            self.schedule.budget.start()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the hook off the loss, and ends what encodes in the background."""
        self._leave_steps_alone()
        self._background.end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Takes the hook off the loss and ends the thread; Lightning does not call `teardown` then."""
        if self._step_rows is not None:
            self._step_rows.remove_hook()  # what it holds may belong into a checkpoint that the error makes
        if self.schedule is not None:
            self.schedule.budget.stop()
        self._background.stop()

    def _look_at_steps(self) -> None:
        """Begins to look at the rows of training steps, where an option asks for it."""
        self._leave_steps_alone()
        if self._finds_rows_for is None:
            return
        self._step_rows = StepRows(
            self.target, self._finds_rows_for, self.schedule, writes_back=self.write_back
        )
        if self.target.loss.knowledge is not None:
            self._step_rows.check_knowledge(self.target.loss.knowledge)

    def _leave_steps_alone(self) -> None:
        """Stops looking at training steps and at the time."""
        if self._step_rows is not None:
            self._step_rows.remove_hook()
            self._step_rows = None
        if self.schedule is not None:
            self.schedule.budget.stop()

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restores the base that a checkpoint names."""
        state, self._to_restore = self._to_restore, None
        if state is None or state["built_at"] is None:
            return
        ranks = Ranks.current()
        directory = Path(trainer.ckpt_path).absolute().parent if trainer.ckpt_path else None
        try:
            restorer = SnapshotRestorer(self._snapshots)
            base = restorer.restore(
                state,
                directory,
                ranks,
                sharded=self._builder.placement == "sharded",
                rows_directory=self._renewer.rows_directory(trainer),
            )
            self._renewer.check_restored(base)
            if self.schedule is not None and state.get("schedule") is None:
                raise SnapshotError('It lacks the drift since its encoding, by which T="auto" decides.')
        except SnapshotError as error:
            # A trainer that crashed and is used again still holds the base of its last epoch.
            self.target.loss.knowledge = self._built_at = self._background.broken_off = None
            rank_zero_warn(
                f"The run resumes with newly encoded knowledge instead of that of epoch {state['built_at']}, "
                f"so its losses differ from those of a run without a break. {error}"
            )
            return
        self.target.loss.knowledge = base.to(pl_module.device)
        self._built_at = state["built_at"]
        self._known_source.key = state.get("source")
        self._known_training_data.key = state.get("training_data")
        self._decided_at = state.get("decided_at")
        self._background.broken_off = state.get("in_flight")
        if self._keeps_ages:
            encoded_at = state.get("encoded_at")  # a run without such options has none
            one_age = RowAges(len(base.fine), state["built_at"])
            self._ages = one_age if encoded_at is None else RowAges.from_state(encoded_at)
        if self.schedule is not None and state.get("schedule") is not None:
            self.schedule.load_state(state["schedule"], ranks)
        if changed := differences(state.get("settings", {}), self._settings()):
            rank_zero_warn(
                f"The run resumes with knowledge that was built with other settings: {', '.join(changed)}. "
                "The new ones take effect at the next refresh."
            )

    def _check_source(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops the base of another source than the present one, so that it is built anew."""
        base, loader = self.target.loss.knowledge, self.loader(trainer)
        assert base is not None
        what = "The knowledge source is another one than that"
        changed = self._known_source.changes(trainer, pl_module, self.target, loader, base)
        if not changed and base.training_clips is not None:
            what = "The training data are other ones than those"
            loader = self._reader.open(trainer, self._renewer.num_neighbors, training_data=True)
            changed = self._known_training_data.changes_beside(
                trainer, pl_module, self.target, loader, base.training_clips
            )
        if changed:
            rank_zero_warn(
                f"{what} of the knowledge in use ({', '.join(changed)}), so the knowledge is encoded anew."
            )
            self.target.loss.knowledge = self._built_at = self._background.broken_off = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refreshes the knowledge if it is due."""
        self._refresh_if_due(trainer, pl_module)
        assert self._built_at is not None
        self._collector.collect()
        if not trainer.barebones:
            ages = {"knowledge_age": float(trainer.current_epoch - self._built_at)}
            if self._ages is not None:
                ages["row_age_mean"], ages["row_age_max"] = self._ages.mean_and_max(trainer.current_epoch)
            log_own(trainer, pl_module, ages, sync_dist=True)

    def _refresh_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refreshes the knowledge if this epoch asks for it, or if there is none."""
        epoch = trainer.current_epoch
        if (refresh := self._background.due_at(epoch)) is not None:
            self._finish_in_background(refresh, trainer, pl_module)
        is_first = self.target.loss.knowledge is None
        if is_first or (self._built_at != epoch and self._is_due(epoch)):
            if not self.in_background or is_first:
                with ExitStack() as stack:
                    for callback in trainer.callbacks:  # type: ignore[attr-defined]
                        if isinstance(callback, RandomStateCallback):
                            stack.enter_context(callback.drawing_from_epoch_start())
                    self.refresh(trainer, pl_module)
            if self.in_background:
                begin = self._background.rehearse if is_first else self._background.begin
                begin(trainer, pl_module, self._renewer)
        self._decided_at = epoch  # behind the refresh, which is made up for if it is interrupted

    def _finish_in_background(
        self, refresh: BackgroundRefresh, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        """Puts the base that was encoded in the background in place of the old one; collective."""
        encoded, seconds, report = refresh.finish(trainer.global_step)
        started = time.perf_counter()
        is_same_source = self._known_source.is_of(refresh.loaders[0])
        renewal = self._renewer.of_encoded(
            trainer, pl_module, refresh.loaders[0], encoded, is_same_source=is_same_source
        )
        self._background.refresh = None
        building = time.perf_counter() - started
        report["refresh_wait_seconds"] += building
        renewal = replace(renewal, report=report)
        self._use(renewal, trainer, pl_module, refresh.loaders, refresh.epoch, seconds + building)

    def _is_due(self, epoch: int) -> bool:
        """Whether the knowledge is refreshed in this epoch; collective with T="auto"."""
        if self.schedule is not None:
            return self._decided_at != epoch and self.schedule.decide(Ranks.current())
        assert isinstance(self.T, int)
        return self.mode == "rolling" or epoch % self.T == 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the snapshots that the last checkpoints do not need."""
        self._collector.collect()
        self._leave_steps_alone()
        self._background.end()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks once which parameters have no gradient: DDP refuses them, one device is silent."""
        average_whole_gradients(trainer, pl_module)
        self._gradient_check.after_backward(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes the knowledge after a resume at which Lightning leaves out `on_train_epoch_start`."""
        self._refresh_if_due(trainer, pl_module)
        self.target.loss.last = {}  # a step that is left out has no terms
        if not is_sharded(trainer):  # there is no value outside of the forward pass
            self.target.loss.check_temperature(batch_idx)
        if self._step_rows is not None:
            self._step_rows.begin(batch, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the terms of the step's loss, where they are read, and makes use of its embeddings."""
        terms = self.target.loss.last
        self._known_clips.add(terms)
        log_loss_terms(trainer, pl_module, terms)
        self._use_step(trainer)

    def _use_step(self, trainer: pl.Trainer) -> bool:
        """Makes use of the rows of the step that has ended, once; whether it has; collective."""
        if self._step_rows is None or self._step_rows.is_used:
            return False
        base = self.target.loss.knowledge
        assert base is not None
        written = self._step_rows.end(base, Ranks.current())
        if written is not None:
            assert self._ages is not None
            self._ages.renew(written, trainer.current_epoch)
            self.num_written += len(written)
            self._snapshots.supersede()
        return True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the drift that the steps have seen, and checks that they find their rows in the knowledge."""
        self._known_clips.check(self.target.loss)
        drift = math.nan
        if self.schedule is not None:
            ranks = Ranks.current()
            drift, share = self.schedule.drift(ranks), self.schedule.share(ranks)
            if not trainer.barebones and not math.isnan(drift):
                num_refreshes = float(self.schedule.num_refreshes)
                values = {"drift": drift, "refreshes": num_refreshes, "refresh_share": share}
                log_own(trainer, pl_module, values)
        if self._step_rows is not None:
            self._step_rows.check_found(drift)

    def refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encode the source with the current encoders and put the new base in place of the old one.

        If anything fails or is interrupted the old base stays in use.

        Args:
            trainer: The running trainer.
            pl_module: Its module.

        Raises:
            ValueError: The source is empty, embeddings contain NaN or Inf, or the loss asks for more
                neighbours than the base has.
            RuntimeError: The source is a stream that does not end, or each rank has a part of its own.
        """
        started = time.perf_counter()
        loaders, limits = self._renewer.open(trainer)
        if self.target.loss.knowledge is None:
            check_ranks_share_source(trainer, pl_module, self.target, loaders[0])
        is_same_source = self._known_source.is_of(loaders[0])
        renewal = self._renewer.renew(trainer, pl_module, loaders, limits, is_same_source=is_same_source)
        seconds = time.perf_counter() - started
        self._use(renewal, trainer, pl_module, loaders, trainer.current_epoch, seconds)

    def _use(
        self,
        renewal: Renewal,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loaders: Sequence[Iterable[Any]],
        epoch: int,
        seconds: float,
    ) -> None:
        """Puts new knowledge, by the encoders of an epoch, in place of the old, and reports on it."""
        base, old = renewal.base, self.target.loss.knowledge
        self.target.loss.check_knowledge(base)
        if self._step_rows is not None:
            self._step_rows.check_knowledge(base)
        self._report.tell_search(base)
        self._snapshots.supersede()  # first: a cluster's signal may ask for a checkpoint at any moment
        self.target.loss.knowledge = base
        for known, loader in zip((self._known_source, self._known_training_data), loaders, strict=False):
            known.note(loader)
        self._built_at = epoch
        if renewal.rows is not None:
            assert self._ages is not None
            self._ages.renew(renewal.rows, epoch)
        elif self._keeps_ages:
            self._ages = RowAges(len(base.fine), epoch)
        if self.schedule is not None:
            self.schedule.note_refresh(seconds, step=trainer.global_step, is_first=old is None)
        self.num_encoded += renewal.num_renewed + renewal.num_in_vain
        report = self._report.values(
            renewal,
            old,
            seconds,
            is_partial=self.mode != "full",
            against_collapse=self.target.loss.against_collapse,
        )
        if not trainer.barebones:
            log_own(trainer, pl_module, report, on_step=False, on_epoch=True, sync_dist=True)

    def loader(self, trainer: pl.Trainer) -> Iterable[Any]:
        """Make a new loader over this rank's items of the source, in order.

        Args:
            trainer: The running trainer, whose training data are the default source.
        """
        return self._reader.open(trainer, self._renewer.num_neighbors)

    def max_items(self, trainer: pl.Trainer) -> int | None:
        """Number of items of the source that a refresh reads at most, over all ranks; `None` for all.

        Args:
            trainer: The running trainer.
        """
        return self._reader.max_items(trainer, self._renewer.num_neighbors)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Writes the base in use, once, before the first checkpoint that depends on it."""
        begin_epoch_with_all_batches(trainer, checkpoint)
        restore_in_checkpoint(pl_module, checkpoint)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        # A callback before this one saves at the end of a step, before this one has made use of it.
        if progress.processed == progress.ready and self._use_step(trainer):
            checkpoint["callbacks"][self.state_key] = self.state_dict()
        base = None if self._known_renewer is None else self.target.loss.knowledge
        if base is None or self._built_at is None:
            return
        if self.save_knowledge:
            SnapshotWriter(self._snapshots).write(base, self._built_at, knowledge_directory(trainer))
        # The rest is there since Lightning asked for the state, before the snapshot was written.
        checkpoint["callbacks"][self.state_key] |= self._snapshots.state()

    def state_dict(self) -> dict[str, Any]:
        """The epoch of the base in use and the snapshot that holds it."""
        base = None if self._known_renewer is None else self.target.loss.knowledge
        return {
            "built_at": self._built_at,
            **self._snapshots.state(),
            "fingerprint": base.fingerprint if base is not None else None,
            "settings": self._settings(),
            "source": self._known_source.key,
            "training_data": self._known_training_data.key,
            "encoded_at": None if self._ages is None else self._ages.encoded_at,
            "decided_at": self._decided_at,
            "in_flight": self._background.state(),
            "schedule": None if self.schedule is None else self.schedule.state(Ranks.current()),
        }

    def _settings(self) -> dict[str, Any]:
        """The arguments that the content of the base depends on."""
        mode = asdict(self.mode) if isinstance(self.mode, MappedRefresh) else self.mode
        own = {"write_back": self.write_back, "max_rows": self.max_rows, "mode": mode}
        return self._builder.describe() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts, when devices are known."""
        self._background = BackgroundSlot()
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
