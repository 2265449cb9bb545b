"""`LoaderStateCallback`: a run that is resumed inside an epoch goes on at its place in the training data."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler

from ask_lightning.callbacks.divided_order import has_divided_order, order_of, sampler_of, watch_order
from ask_lightning.callbacks.epoch_start import before_batches, forget_actions
from ask_lightning.encoding.isolation import preserved_random_state
from ask_lightning.utilities.distributed import Ranks


@runtime_checkable
class StatefulLoader(Protocol):
    """A loader that says where it is and can be put back there, by which Lightning knows it as well."""

    def state_dict(self) -> dict[str, Any]:
        """The loader's place in its data."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the loader back to a place.

        Args:
            state_dict: What `state_dict` returned.
        """


class LoaderStateCallback(Callback):
    """Puts stateful training loaders back to where they were, so that a resume inside an epoch is exact.

    Lightning itself saves and restores the state of such loaders, but not exactly: it restores the first
    process's state on all of them, makes the batches of the epoch before it tells the sampler which epoch it
    is, reads loaders without a length one batch ahead of training, begins with no batch at all after a
    checkpoint at the last step of an epoch, or numbers those of a stream on from there, and leaves the state
    out after one at the end of an epoch; torchdata counts the batches of a stream twice that it has passed
    over at a resume. This callback keeps the state of each process and restores it in their stead.

    Requirements:
        A training loader with `state_dict` and `load_state_dict`, such as
        `torchdata.stateful_dataloader.StatefulDataLoader` or `litdata.StreamingDataLoader`. What is not part
        of a loader, such as the random streams of dropout, is left to `RandomStateCallback`.

    Raises:
        RuntimeError: At the start of `fit`, if no training loader is stateful.

    Examples:
        >>> from ask_lightning import KnowledgeRefreshCallback
        >>> callbacks = [KnowledgeRefreshCallback(T=15), LoaderStateCallback()]  # of a Trainer
    """

    def __init__(self) -> None:
        self._epoch = 0  # of the batches that the loaders yield
        self._places: list[dict[str, Any]] = []  # of loaders that are read ahead: the last two
        self._surplus: list[int] = []  # of the batches that each loader counts in its present epoch
        self._to_restore: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Sees to it that orders are noted which Lightning draws when it has made the loaders."""
        if stage != "fit":
            return
        # What a run has left that was broken off:
        self._to_restore = None
        self.teardown(trainer, pl_module, stage)
        fit_loop = trainer.fit_loop
        load_states = fit_loop._load_combined_loader_states

        def watch_and_load_states() -> None:
            for loader in stateful_loaders(trainer):
                watch_order(loader)
            if self._to_restore is None or len(self._to_restore["ranks"]) == Ranks.current().size:
                load_states()
            else:  # a place in the part of another number of processes
                fit_loop._combined_loader_states_to_load = []

        fit_loop.__dict__["_load_combined_loader_states"] = watch_and_load_states

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the loaders back to where the run was that is resumed."""
        loaders = stateful_loaders(trainer)
        if not loaders:
            kinds = ", ".join(sorted({type(loader).__name__ for loader in _training_loaders(trainer)}))
            raise RuntimeError(
                "LoaderStateCallback needs a training loader with `state_dict` and `load_state_dict`, but "
                f"got {kinds}. Use torchdata's StatefulDataLoader in its place, or leave the callback out."
            )
        for loader in loaders:
            warn_of_order(loader)
        warn_of_reloading(trainer)
        warn_of_other_orders(loaders, Ranks.current())
        warn_of_ended_loaders(trainer, loaders)
        state, self._to_restore = self._to_restore, None
        place, is_beginning = (None, False) if state is None else self._restore(trainer, loaders, state)
        self._epoch = trainer.current_epoch
        is_ahead = is_read_ahead(trainer)
        self._surplus = [0] * len(loaders)
        if place is not None:
            stored = zip(loaders, place["loaders"], strict=True)
            self._surplus = [_batches_ahead(loader, state, is_ahead) for loader, state in stored]
        self._places = []
        if is_ahead:
            if not is_beginning:
                self._note_place(trainer)
            self._watch_reading(trainer)

    def _restore(
        self, trainer: pl.Trainer, loaders: list[StatefulLoader], state: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, bool]:
        """Bring loaders to a stored place.

        Returns:
            The place, if it is one inside the present epoch, and whether an epoch will begin in its stead.
        """
        ranks = Ranks.current()
        if len(state["ranks"]) != ranks.size:
            if trainer.current_epoch != state["epoch"]:  # over: the next has all batches
                for loader in loaders:
                    _set_sampler_epoch(loader, trainer.current_epoch)
                count_batches_from_zero(trainer)
                before_batches(trainer, lambda: self._begin(trainer))
                return None, True
            rank_zero_warn(
                f"The run resumes on {ranks.size} processes with the place in the data of "
                f"{len(state['ranks'])}, so the rest of this epoch is not that of a run without a break."
            )
            return None, False
        place: dict[str, Any] = state["ranks"][ranks.rank]
        if len(place["loaders"]) != len(loaders):
            raise RuntimeError(
                f"The checkpoint holds the places of {len(place['loaders'])} stateful training loaders, but "
                f"there are {len(loaders)}. Resume with the loaders of the run that wrote it."
            )
        _put_back(loaders, place, state["epoch"])
        if trainer.current_epoch != state["epoch"]:
            # That epoch is over: what follows its batches moves a loader to the next one.
            with preserved_random_state():
                beyond = [next(iter(loader), None) is not None for loader in loaders]  # type: ignore[call-overload]
            for loader, is_next, stored in zip(loaders, beyond, place["loaders"], strict=True):
                # Unless it was left before its end, it moves there by itself when it is iterated.
                if is_next and not _was_left(loader, stored, state["batches"]):
                    loader.load_state_dict(deepcopy(stored))
            _draw_orders_from(loaders, None)
            _leave_restored_place(loaders)
            _restore_generators(loaders, place)
            for loader in loaders:
                _set_sampler_epoch(loader, trainer.current_epoch)
            count_batches_from_zero(trainer)
            before_batches(trainer, lambda: self._begin(trainer))
            return None, True
        if not reads_anew(trainer):
            with preserved_random_state():  # from which the epoch has drawn before
                _iterate(trainer, place["ended"])
        _draw_orders_from(loaders, None)
        _restore_generators(loaders, place)
        return place, False

    def _begin(self, trainer: pl.Trainer) -> None:
        """Begin to read an epoch where others do, behind `on_train_epoch_start`."""
        iterate_once_more(trainer)
        if is_read_ahead(trainer):
            self._note_place(trainer)

    def _present_place(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Where the loaders are now."""
        place = _place_of(stateful_loaders(trainer)) | {"ended": _ended(trainer)}
        for stored, surplus in zip(place["loaders"], self._surplus, strict=True):
            if surplus:
                counts, name = _count_in(stored)
                counts[name] -= surplus
        return place

    def _note_place(self, trainer: pl.Trainer) -> None:
        self._places = [*self._places[-1:], self._present_place(trainer)]

    def _watch_reading(self, trainer: pl.Trainer) -> None:
        """Note the place behind each batch that is read, also those that are read between two hooks."""
        epoch_loop = trainer.fit_loop.epoch_loop
        after_fetch = epoch_loop._on_after_fetch

        def note_after_fetch() -> None:
            after_fetch()
            if trainer.current_epoch != self._epoch:
                self._begin_epoch(trainer)
            self._note_place(trainer)

        epoch_loop.__dict__["_on_after_fetch"] = note_after_fetch

    def _begin_epoch(self, trainer: pl.Trainer) -> None:
        self._epoch, self._surplus = trainer.current_epoch, [0] * len(self._surplus)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves Lightning's loop as it was."""
        forget_actions(trainer)
        trainer.fit_loop.epoch_loop.__dict__.pop("_on_after_fetch", None)
        trainer.fit_loop.__dict__.pop("_load_combined_loader_states", None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leaves Lightning's loop as it was; Lightning does not call `teardown` after an error."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the epoch that the loaders are in."""
        if trainer.current_epoch != self._epoch:
            self._begin_epoch(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the next epoch begin at its start after one that was resumed."""
        _leave_restored_place(stateful_loaders(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the place of each process's loaders to the checkpoint."""
        if not self._surplus:  # before training
            return
        # With one batch read ahead, training has had those up to the place before the last one.
        place = self._places[0] if self._places else self._present_place(trainer)
        ranks = Ranks.current().all_gather_object(place)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        batches = progress.ready
        if progress.processed < progress.ready:
            rank_zero_warn(
                f"This checkpoint is written inside the training step of batch {progress.ready - 1} of epoch "
                f"{self._epoch}, of which the loader has moved on already: a run that resumes from it leaves "
                "that batch out. Resume from one that is written between steps, such as by "
                "ModelCheckpoint(every_n_train_steps=...)."
            )
        elif trainer.fit_loop.epoch_loop._should_accumulate():
            rank_zero_warn(
                f"This checkpoint is written behind batch {batches - 1} of epoch {self._epoch}, whose "
                "gradients wait for those of further batches and are not in it: a run that resumes from it "
                "makes its first step without them. Resume from one that is written behind whole steps, as "
                "by ModelCheckpoint(every_n_train_steps=...); a `val_check_interval` that is a multiple of "
                "`accumulate_grad_batches` validates behind them, too."
            )
        checkpoint["callbacks"][self.state_key] = {"epoch": self._epoch, "batches": batches, "ranks": ranks}
        # Lightning puts the loaders there before this callback does, which must not fail.
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = deepcopy(place["loaders"])

    def state_dict(self) -> dict[str, Any]:
        """Nothing before training; see `on_save_checkpoint`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the places until the loaders are there."""
        self._to_restore = state_dict or None


def stateful_loaders(trainer: pl.Trainer) -> list[StatefulLoader]:
    """The training loaders that can be put back to where they were.

    Args:
        trainer: The running trainer.
    """
    return [loader for loader in _training_loaders(trainer) if isinstance(loader, StatefulLoader)]


def is_read_ahead(trainer: pl.Trainer) -> bool:
    """Whether Lightning reads a batch before training has had the one before, as it does without a length.

    Args:
        trainer: The running trainer.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and fetcher.length is None


def reads_anew(trainer: pl.Trainer) -> bool:
    """Whether Lightning itself begins to read the training loaders once more behind `on_train_start`.

    Args:
        trainer: The trainer at `on_train_start`.
    """
    fit_loop = trainer.fit_loop
    is_resuming = fit_loop.restarting or getattr(fit_loop, "is_resuming", False)
    return trainer.current_epoch > 0 and not is_resuming


def iterate_once_more(trainer: pl.Trainer) -> None:
    """Begin to read an epoch, unless Lightning is about to.

    Lightning has begun before, with the random numbers and the sampler's epoch of a new run.

    Args:
        trainer: The trainer in a function of `before_batches`.
    """
    if not reads_anew(trainer):
        fetcher: Any = trainer.fit_loop._data_fetcher
        iter(fetcher)


def has_only_to_end(trainer: pl.Trainer) -> bool:
    """Whether a resumed run has had all batches of its epoch, as behind the last validation of one.

    Args:
        trainer: The trainer in a function of `before_batches`.
    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return bool(batches.is_last_batch and batches.current.ready and epochs.processed < epochs.started)


def count_batches_from_zero(trainer: pl.Trainer) -> None:
    """Let an epoch after one that ended with its checkpoint begin with batch 0.

    Lightning does so where loaders have a length. Else it goes on with the number of the epoch before, by
    which it decides after which batches accumulated gradients make a step.

    Args:
        trainer: The trainer at the start of a resumed run, whose checkpoint is of the end of an epoch.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    if not epoch_loop.restarted_on_train_batch_end or trainer.num_training_batches != float("inf"):
        return
    progress: Any = epoch_loop.batch_progress
    progress.reset_on_run()
    progress.current.completed = -1  # Lightning adds the batch of the checkpoint
    epoch_loop.scheduler_progress.reset_on_run()
    epoch_loop.automatic_optimization.optim_progress.reset_on_run()
    epoch_loop.val_loop.batch_progress.total.reset()


def warn_of_order(loader: object) -> None:
    """Warn of a sampler whose order cannot be made again, so that a loader's place in it says nothing.

    Args:
        loader: Stateful training loader.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return
    sampler = sampler_of(loader)
    if is_divided := isinstance(sampler, DistributedSamplerWrapper):
        # Lightning draws the whole order through it, of which a loader's state then knows nothing.
        if has_divided_order(loader):
            return
        sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
    if sampler is None or isinstance(sampler, SequentialSampler) or hasattr(sampler, "set_epoch"):
        return
    has_state = isinstance(sampler, StatefulLoader) or type(sampler).__module__.split(".")[0] == "torchdata"
    if has_state and not is_divided:
        return
    rank_zero_warn(
        f"The order of {type(sampler).__name__}{', divided among processes,' if is_divided else ''} is not "
        "part of the state of the training loader, so a resume reads other batches than a run without a "
        "break. Use StatefulDataLoader(shuffle=True), or a sampler with `set_epoch` whose order depends on "
        "the epoch."
    )


def warn_of_reloading(trainer: pl.Trainer) -> None:
    """Warn of loaders that Lightning makes anew between epochs, whose places say nothing of one another.

    Args:
        trainer: The running trainer.
    """
    if epochs := trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        rank_zero_warn(
            f"With reload_dataloaders_every_n_epochs={epochs} a resumed run makes its training loaders with "
            "other random numbers and at other epochs than a run without a break, so it may read other "
            "batches. Leave the option out, and let a sampler with `set_epoch` or the data module's hooks "
            "change what is read."
        )


def warn_of_ended_loaders(trainer: pl.Trainer, loaders: list[StatefulLoader]) -> None:
    """Warn of loaders that begin anew at a resume where the others are to go on without them.

    Args:
        trainer: The running trainer.
        loaders: Its stateful training loaders.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None or combined._mode != "max_size" or len(combined.flattened) == 1:
        return
    others = [loader for loader in loaders if not _is_of_torchdata(loader)]
    if others:
        rank_zero_warn(
            "LoaderStateCallback has training loaders combined by mode 'max_size', and the state of "
            f"{type(others[0]).__name__} may not tell that it has ended: a resume behind its end reads it "
            'again. Use CombinedLoader(..., "max_size_cycle"), or torchdata\'s StatefulDataLoader.'
        )


def warn_of_other_orders(loaders: list[StatefulLoader], ranks: Ranks) -> None:
    """Warn where each process has drawn an order of its own of which it takes its part; collective.

    Args:
        loaders: Stateful training loaders.
        ranks: The processes of the run.
    """
    states = [order.drawn_from for loader in loaders if (order := order_of(loader)) is not None]
    if not states:
        return
    digests = ranks.all_gather_object([None if state is None else state.tolist() for state in states])
    if any(digest != digests[0] for digest in digests):
        rank_zero_warn(
            "Each process has shuffled the training data in its own way and takes its part of that order, so "
            "some pairs are trained on by several processes and others by none. Call "
            "lightning.seed_everything(seed) before the loader is made, or give it a generator with the same "
            "seed on all processes."
        )


def warn_of_inexact_resume(trainer: pl.Trainer) -> None:
    """Warn of a resume inside an epoch after which training reads other batches than without a break.

    Where loaders without a state have a length Lightning warns itself.

    Args:
        trainer: Trainer at the start of training.
    """
    is_inside = trainer.fit_loop.restarting and trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not is_inside or any(isinstance(each, LoaderStateCallback) for each in callbacks):
        return
    if stateful_loaders(trainer):
        rank_zero_warn(
            "The run resumes inside an epoch, where Lightning does not bring every stateful training loader "
            "to its very place. Add LoaderStateCallback() to the callbacks, and resume with it from a "
            "checkpoint of a run that had it."
        )
    elif trainer.num_training_batches == float("inf"):
        rank_zero_warn(
            "The run resumes inside an epoch, and its training stream has no state by which to go on: it "
            "begins at its start. Use torchdata's StatefulDataLoader with LoaderStateCallback()."
        )


def _training_loaders(trainer: pl.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def _generators(loader: object) -> dict[str, torch.Generator]:
    """The generators from which a loader draws orders and the seeds of its workers."""
    holders = {"loader": loader, "sampler": sampler_of(loader), "order": order_of(loader)}
    found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Generator)}


def _place_of(loaders: list[StatefulLoader]) -> dict[str, Any]:
    # Copies, because some loaders return a state that they go on changing.
    return {
        "loaders": [deepcopy(loader.state_dict()) for loader in loaders],
        "generators": [
            {name: generator.get_state() for name, generator in _generators(loader).items()}
            for loader in loaders
        ],
        "orders": [order.drawn_from if (order := order_of(loader)) else None for loader in loaders],
    }


def _ended(trainer: pl.Trainer) -> list[bool] | None:
    """Which loaders have been at their end in this epoch and have begun again, where Lightning notes it."""
    combined = trainer.fit_loop._combined_loader
    consumed = getattr(None if combined is None else combined._iterator, "_consumed", None)
    return None if consumed is None else list(consumed)


def _iterate(trainer: pl.Trainer, ended: list[bool] | None) -> None:
    """Begin to read training batches.

    Args:
        trainer: The running trainer.
        ended: What `_ended` has returned of an epoch inside of which reading begins.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher

    def reset() -> None:  # called before the first batch is read ahead
        type(fetcher).reset(fetcher)
        if ended is not None:
            fetcher.combined_loader._iterator._consumed = list(ended)

    fetcher.__dict__["reset"] = reset
    try:
        iter(fetcher)
    finally:
        del fetcher.__dict__["reset"]


def _count_in(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where the state of a loader of torchdata counts its batches: a mapping and a key of it."""
    if "_num_yielded" in state:
        return state, "_num_yielded"
    snapshot = state.get("_snapshot")
    if isinstance(snapshot, dict) and "_snapshot_step" in snapshot:
        return snapshot, "_snapshot_step"
    return {"": 0}, ""


def _batches_counted(loader: StatefulLoader) -> int:
    counts, name = _count_in(loader.state_dict())
    return int(counts[name])


def _batches_ahead(loader: StatefulLoader, stored: dict[str, Any], is_read_ahead: bool) -> int:
    """How many batches more than training has had a loader counts that was brought to a stored place."""
    counts, name = _count_in(stored)
    if not name:  # not asked: before its first batch a loader of litdata forgets the epoch when it is
        return 0
    return _batches_counted(loader) - int(counts[name]) - is_read_ahead


def _was_left(loader: Any, stored: dict[str, Any], batches: int) -> bool:
    """Whether training left an epoch before a loader's end, as by `limit_train_batches`.

    Args:
        loader: Loader that was brought to its place at the end of the epoch and has yielded a batch.
        stored: That place.
        batches: Number of batches that training has had of the epoch.
    """
    counts, name = _count_in(stored)
    if name:
        return _batches_counted(loader) > int(counts[name])
    try:
        return bool(batches < len(loader))
    except TypeError:  # without a length
        return False


def _put_back(loaders: list[StatefulLoader], place: dict[str, Any], epoch: int) -> None:
    """Bring loaders to a place in an epoch; they read from there when they are iterated."""
    _draw_orders_from(loaders, place["orders"])
    for loader, stored in zip(loaders, place["loaders"], strict=True):
        _set_sampler_epoch(loader, epoch)
        loader.load_state_dict(_before_its_end(stored))


def _before_its_end(stored: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state by which a loader of torchdata that has ended ends again, and does not restart."""
    state = deepcopy(stored)
    if state.get("_iterator_finished"):
        state["_iterator_finished"] = False
    return state


def _draw_orders_from(loaders: list[StatefulLoader], states: list[Tensor | None] | None) -> None:
    """Have each order drawn from a stored state of its generator; from the present one without states."""
    for number, loader in enumerate(loaders):
        if (order := order_of(loader)) is not None:
            order.draw_from = None if states is None else states[number]


def _is_of_torchdata(loader: object) -> bool:
    return any(kind.__module__.split(".")[0] == "torchdata" for kind in type(loader).__mro__)


def _leave_restored_place(loaders: list[StatefulLoader]) -> None:
    """Have loaders of litdata begin anew when they are next iterated.

    They go on at a place to which they were brought until an iterator ends, which Lightning does not wait for
    where it knows their length.
    """
    for loader in loaders:
        if type(loader).__module__.split(".")[0] == "litdata":
            loader.restore = False  # type: ignore[attr-defined]


def _restore_generators(loaders: list[StatefulLoader], place: dict[str, Any]) -> None:
    for loader, states in zip(loaders, place["generators"], strict=True):
        for name, generator in _generators(loader).items():
            if name in states:
                generator.set_state(states[name])
