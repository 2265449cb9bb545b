"""`in_background=True`: a refresh encodes while training goes on, and is used from the next epoch on."""

import multiprocessing
import random
import threading
import time
import traceback

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import IterableDataset

from ask_lightning import KnowledgeRefreshCallback
from ask_lightning.callbacks.background_refresh import check_background
from ask_lightning.encoding.background import BackgroundEncoder
from ask_lightning.encoding.training_copy import TrainingCopy
from tests.helpers.clients import (
    MemoryLogger,
    Pairs,
    PlainTowers,
    RestlessTowers,
    Watcher,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.interrupted_run import STEPS, Stop, Stopped
from tests.helpers.ranks import on_ranks
from tests.helpers.renewal_run import PAIRS, assert_goes_on, fit, logged

T, EPOCHS = 2, 6


class Foreground(KnowledgeRefreshCallback):
    """Keeps what a refresh in the foreground would store at the beginning of each epoch."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.bases = []

    def on_train_epoch_start(self, trainer, pl_module):
        with torch.random.fork_rng():
            loaders, limits = self._renewer.open(trainer)
            renewal = self._renewer.renew(trainer, pl_module, loaders, limits, is_same_source=True)
        self.bases.append(renewal.base)
        super().on_train_epoch_start(trainer, pl_module)


class Bases(pl.Callback):
    """The knowledge in use in each step."""

    def __init__(self):
        self.bases = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.bases.append(pl_module.loss.knowledge)


def no_thread() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "knowledge-refresh"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert no_thread()


@pytest.fixture(name="whole", scope="module")
def whole_fixture():
    return fit(T=T, epochs=EPOCHS, in_background=True)


def test_the_base_is_that_of_a_refresh_with_the_weights_of_its_epoch():
    refresh, bases = Foreground(T, num_prototypes=6, in_background=True), Bases()
    fit(epochs=EPOCHS, refresh=refresh, extra=(bases,))
    for step, base in enumerate(bases.bases):
        epoch = step // STEPS
        due = 0 if epoch < 3 else (epoch - 1) // T * T
        assert base.fingerprint == refresh.bases[due].fingerprint, step
        assert torch.equal(base.fine.audio, refresh.bases[due].fine.audio)
        assert torch.equal(base.coarse.text, refresh.bases[due].coarse.text)


def test_encoders_with_dropout_running_means_and_a_step_of_its_own():
    """The copy is in evaluation mode, and finds out itself what the training step passes to the encoders."""

    class Parts(RestlessTowers):
        def encode_audio(self, audio):
            return self.audio_encoder(self.dropout(self.norm(audio)))

        def encode_text(self, text):
            return self.text_encoder(text)

        def training_step(self, batch, batch_idx):
            assert self.trainer.training or not self.training
            return self.contrast(self.encode_audio(batch["audio"]), self.encode_text(batch["text"]))

    refresh, bases = Foreground(T, num_prototypes=6, in_background=True), Bases()
    run = make_trainer(max_epochs=4, callbacks=[refresh, bases])
    run.fit(wrap(Parts()), make_loader())
    fingerprints = [base.fingerprint for base in bases.bases]
    assert fingerprints[3 * STEPS :] == [refresh.bases[2].fingerprint] * STEPS
    assert len(set(fingerprints)) == 2


def test_used_from_the_next_epoch_on(whole):
    per_epoch = [set(whole["knowledge"][start : start + STEPS]) for start in range(0, EPOCHS * STEPS, STEPS)]
    assert all(len(names) == 1 for names in per_epoch)
    assert per_epoch[0] == per_epoch[1] == per_epoch[2] != per_epoch[3] == per_epoch[4] != per_epoch[5]
    assert logged(whole, "ask/knowledge_age") == [0, 1, 2, 1, 2, 1]
    assert logged(whole, "ask/refresh_lag") == [STEPS, STEPS]
    assert all(wait > 0 for wait in logged(whole, "ask/refresh_wait_seconds"))
    assert len(logged(whole, "ask/refresh_seconds")) == 3
    assert all(drift > 0 for drift in logged(whole, "ask/rdm_audio"))


def test_every_epoch():
    run = fit(T=1, epochs=4, in_background=True)
    assert logged(run, "ask/knowledge_age") == [0, 1, 1, 1]
    assert len(set(run["knowledge"])) == 3


def test_with_momentum_and_refinement():
    run = fit(T=1, epochs=3, in_background=True, momentum=0.5, refine="graph")
    before, after = run["stored"][1], run["stored"][2]
    assert not torch.equal(before, after)


class Slow(Pairs):
    """Each pair takes its time to read."""

    def __init__(self, size=PAIRS, seconds=0.01):
        super().__init__(size)
        self.seconds = seconds

    def __getitem__(self, row):
        time.sleep(self.seconds)
        return super().__getitem__(row)


def test_the_run_does_not_depend_on_how_fast_it_is(whole):
    """Encoding takes longer than the epoch, which is waited for."""
    slow = fit(T=T, epochs=4, in_background=True, source=Slow(), num_workers=1)
    assert slow["losses"] == whole["losses"][: 4 * STEPS]
    assert max(logged(slow, "ask/refresh_wait_seconds")) > 0.2


class Drawing(Pairs):
    """Reading a pair draws from the global streams."""

    def __getitem__(self, row):
        random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002
        return super().__getitem__(row)


def noise_of(**settings):
    pl.seed_everything(3, verbose=False)
    logger, watcher = MemoryLogger(), Watcher()
    callbacks = [make_refresh(T, Drawing(PAIRS), **settings), watcher]
    run = make_trainer(max_epochs=4, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    run.fit(wrap(RestlessTowers()), make_loader())
    return logger.values("train/noise"), watcher.clips, watcher.losses


def test_random_streams_of_training_stay_what_they_are():
    noise, clips, losses = noise_of(in_background=True)
    same_noise, same_clips, other_losses = noise_of()
    assert noise == same_noise
    assert clips == same_clips
    assert losses[: 2 * STEPS] == other_losses[: 2 * STEPS]


def test_encoders_that_draw_in_evaluation_mode_are_refused():
    class Noisy(PlainTowers):
        def encode_audio(self, batch):
            return super().encode_audio(batch) + torch.rand(())

    with pytest.raises(RuntimeError, match=r"draw random numbers in evaluation mode.*leave `in_background`"):
        make_trainer(callbacks=[make_refresh(1, in_background=True)]).fit(wrap(Noisy()), make_loader())


def test_forgets_no_casts_of_training(monkeypatch):
    """A weight that is used twice under autocast is cast once, whatever ends in the background meanwhile."""
    run_thread, seen = BackgroundEncoder._run, []

    def spied(self):
        run_thread(self)
        seen.append(torch.autocast_decrement_nesting())

    monkeypatch.setattr(BackgroundEncoder, "_run", spied)
    model = PlainTowers()
    run = make_trainer(max_epochs=3, precision="bf16-mixed", callbacks=[make_refresh(1, in_background=True)])
    run.fit(wrap(model), make_loader())
    assert seen == [0], "only here is the thread's outermost context left"


@pytest.mark.parametrize("when", ["soon", "in time"])
def test_an_error_in_the_thread_is_raised_in_training(when):
    """With the traceback of the place where it happened."""

    class Encoders(PlainTowers):
        def encode_text(self, batch):
            if threading.current_thread() is not threading.main_thread():
                raise ValueError("This caption is broken.")
            return super().encode_text(batch)

    class Pause(pl.Callback):
        def __init__(self):
            self.step = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.step = trainer.global_step
            if when == "soon" and trainer.current_epoch == 1 and batch_idx == 0:
                give_up = time.monotonic() + 60
                while not no_thread() and time.monotonic() < give_up:
                    time.sleep(0.01)

    pause, refresh = Pause(), make_refresh(1, in_background=True)
    module = wrap(Encoders())
    with pytest.raises(ValueError, match="This caption is broken") as caught:
        make_trainer(callbacks=[refresh, pause]).fit(module, make_loader())
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "encode_text" in frames
    assert STEPS < pause.step <= 2 * STEPS
    assert when != "soon" or pause.step == STEPS + 1
    assert module.loss.knowledge is not None
    assert no_thread()


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_ends_with_training(error):
    """Long before the source is read."""

    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 2:
                assert not no_thread()
                self.at = time.monotonic()
                raise error

    # The first base, the rehearsal, and the refresh in the background, which would take ten seconds.
    sources = iter([Pairs(PAIRS), Pairs(PAIRS), Slow(200, 0.05)])
    interrupt, refresh = Interrupt(), make_refresh(1, lambda: next(sources), in_background=True)
    with pytest.raises((Stopped, SystemExit)):
        make_trainer(callbacks=[refresh, interrupt]).fit(wrap(PlainTowers()), make_loader())
    assert time.monotonic() - interrupt.at < 5
    assert no_thread()
    assert not multiprocessing.active_children()


def test_the_last_epoch_begins_nothing(monkeypatch):
    started = []
    monkeypatch.setattr(BackgroundEncoder, "start", lambda self: started.append(self))
    fit(T=2, epochs=3, in_background=True)
    assert not started


@pytest.mark.parametrize(("epoch", "batch"), [(2, 3), (3, 1), (4, 2), (5, 0)])
def test_resumed_exactly(epoch, batch, whole, tmp_path):
    """The last checkpoint ends the epoch before, in which a refresh was in flight, or was not."""
    with pytest.raises(Stopped):
        fit(1, tmp_path / "one", T=T, epochs=EPOCHS, in_background=True, extra=(Stop(epoch, batch),))
    path = tmp_path / "one" / "last.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["KnowledgeRefreshCallback"]
    assert (state["in_flight"] is not None) == (epoch in (3, 5))
    resumed = fit(1, tmp_path / "two", T=T, epochs=EPOCHS, in_background=True, resume=path)
    assert_goes_on(resumed, whole, epoch)
    assert logged(resumed, "ask/refresh_lag") == [STEPS] * (2 - (epoch > 3))


def test_resumed_inside_the_epoch_of_the_refresh(whole, tmp_path):
    """Lightning begins the epoch's batches anew; the knowledge is that of the weights of its start."""

    def run(directory, resume=None, stop=None):
        pl.seed_everything(1, verbose=False)
        keep = ModelCheckpoint(directory, save_last=True, every_n_train_steps=1)
        bases = Bases()
        callbacks = [make_refresh(T, in_background=True), bases, *([stop] if stop else []), keep]
        going = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        going.fit(wrap(PlainTowers()), make_loader(), ckpt_path=resume)
        return [base.fingerprint for base in bases.bases]

    unbroken = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "one", stop=Stop(2, 3))
    resumed = run(tmp_path / "two", resume=tmp_path / "one" / "last.ckpt")
    assert resumed[-STEPS:] == unbroken[3 * STEPS :]
    # At the last step of an epoch, after which Lightning leaves the start of the next one out.
    with pytest.raises(Stopped):
        run(tmp_path / "three", stop=Stop(3, 0))
    resumed = run(tmp_path / "four", resume=tmp_path / "three" / "last.ckpt")
    assert set(resumed) == set(unbroken[3 * STEPS :])


def test_fit_again_goes_on():
    """With the same objects, after a run whose last epoch had a refresh that nobody was going to see."""
    pl.seed_everything(1, verbose=False)
    module, refresh, bases = wrap(PlainTowers()), make_refresh(T, in_background=True), Bases()
    run = make_trainer(max_epochs=3, callbacks=[refresh, bases])
    run.fit(module, make_loader())
    assert refresh.state_dict()["in_flight"]["epoch"] == 2
    run.fit_loop.max_epochs = 4
    run.fit(module, make_loader())
    pl.seed_everything(1, verbose=False)
    again, unbroken = wrap(PlainTowers()), Bases()
    make_trainer(max_epochs=4, callbacks=[make_refresh(T, in_background=True), unbroken]).fit(
        again, make_loader()
    )
    # The optimiser begins anew with a `fit`, so only the knowledge is the same.
    assert [base.fingerprint for base in bases.bases] == [base.fingerprint for base in unbroken.bases]


def test_only_weights_that_have_changed_are_in_the_checkpoint():
    class Frozen(PlainTowers):
        def __init__(self):
            super().__init__()
            self.text_encoder.requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.Adam(self.audio_encoder.parameters(), lr=1e-2)

    refresh = make_refresh(2, in_background=True)
    make_trainer(max_epochs=3, callbacks=[refresh]).fit(wrap(Frozen()), make_loader())
    assert set(refresh.state_dict()["in_flight"]["weights"]) == {"audio_encoder.weight", "audio_encoder.bias"}


def test_a_checkpoint_copies_the_weights_once(monkeypatch, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    copies, changed_weights = [], TrainingCopy.changed_weights
    monkeypatch.setattr(
        TrainingCopy, "changed_weights", lambda self: copies.append(self) or changed_weights(self)
    )
    callbacks = [make_refresh(2, in_background=True), Save()]
    make_trainer(max_epochs=4, callbacks=callbacks).fit(wrap(PlainTowers()), make_loader())
    state = torch.load(tmp_path / "inside.ckpt", weights_only=True)["callbacks"]["KnowledgeRefreshCallback"]
    assert state["in_flight"]["epoch"] == 2
    assert state["snapshot"]
    assert len(copies) == 1


def test_resumed_in_the_foreground_says_what_is_left_out(tmp_path):
    with pytest.raises(Stopped):
        fit(1, tmp_path / "one", T=T, epochs=EPOCHS, in_background=True, extra=(Stop(3),))
    with pytest.warns(UserWarning, match="resumes without the refresh of epoch 2 that was in flight"):
        fit(1, None, T=T, epochs=4, resume=tmp_path / "one" / "last.ckpt")


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_on_two_ranks_as_on_one(placement, whole):
    runs = on_ranks(2, fit, 2, T=T, epochs=4, in_background=True, placement=placement, grouped=False)
    assert runs[0]["knowledge"] == runs[1]["knowledge"]
    assert logged(runs[0], "ask/refresh_lag") == [STEPS]
    for epoch in range(4):
        for run in runs:
            torch.testing.assert_close(run["stored"][epoch], whole["stored"][epoch], atol=1e-4, rtol=0)


class BrokenInThread(PlainTowers):
    def encode_text(self, batch):
        if self.global_rank == 1 and threading.current_thread() is not threading.main_thread():
            raise ValueError("This caption is broken.")
        return super().encode_text(batch)


def told_on_this_rank() -> str:
    try:
        fit(2, T=1, epochs=3, in_background=True, model=BrokenInThread())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_an_error_on_one_rank_reaches_all_at_the_end_of_the_epoch():
    first, second = on_ranks(2, told_on_this_rank, grouped=False)
    assert "Rank 1 failed while encoding its part of the knowledge source in the background" in first
    assert second == "ValueError: This caption is broken."


def test_hooks_and_epoch_that_the_copy_sees():
    """Those of the run where it was when the refresh was due, in a validation stage, on the copy itself."""
    seen = []

    class Hooked(PlainTowers):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.02)
                seen.append((self.trainer.validating, self.current_epoch, self.global_step, self.training))
            return batch

    module = wrap(Hooked())
    make_trainer(max_epochs=3, callbacks=[make_refresh(1, in_background=True)]).fit(module, make_loader())
    assert set(seen) == {(True, 1, STEPS, False)}
    assert len(seen) == STEPS - 2, "the first two batches are encoded in the main thread"
    assert module.trainer.current_epoch == 3


def test_hooks_of_a_data_module():
    seen = []

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            if threading.current_thread() is not threading.main_thread():
                seen.append(self.trainer.validating)
            return batch

    run = make_trainer(max_epochs=3, callbacks=[make_refresh(1, in_background=True)])
    run.fit(wrap(PlainTowers()), datamodule=Data())
    assert set(seen) == {True}


def test_a_model_that_cannot_be_copied_is_told_before_the_first_step():
    class Open(PlainTowers):
        def on_fit_start(self):
            self.lock = threading.Lock()

    watcher = Watcher()
    run = make_trainer(callbacks=[make_refresh(1, in_background=True), watcher])
    with pytest.raises(RuntimeError, match=r"cannot be copied \(TypeError: cannot pickle '_thread.lock'"):
        run.fit(wrap(Open()), make_loader())
    assert not watcher.losses


def test_a_copy_that_uses_the_weights_of_the_original_is_refused():
    class Bound(PlainTowers):
        def __init__(self):
            super().__init__()
            self.encode_audio = lambda batch: self.audio_encoder(batch["audio"])

    run = make_trainer(callbacks=[make_refresh(1, in_background=True)])
    with pytest.raises(RuntimeError, match="computes with parameters of the original"):
        run.fit(wrap(Bound()), make_loader())


class Stream(IterableDataset):
    def __iter__(self):
        pairs = Pairs(PAIRS)
        return (pairs[row] for row in range(PAIRS))


def test_a_stream_is_read_by_a_worker(whole):
    run = fit(T=T, epochs=4, in_background=True, source=Stream())
    assert run["knowledge"] == whole["knowledge"][: 4 * STEPS]


def test_a_source_that_is_read_in_this_process_is_refused():
    batches = list(make_loader())
    with pytest.raises(RuntimeError, match=r"is read in this process.*Pass a Dataset or a DataLoader"):
        fit(T=1, in_background=True, source=batches)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"write_back": True}, "`in_background=True` and `write_back=True` exclude each other"),
        ({"mode": "rolling"}, '`in_background=True` and `mode="rolling"` exclude each other'),
        ({"mode": "mapped"}, '`in_background=True` and `mode="mapped"` exclude each other'),
        ({"T": "auto"}, '`in_background=True` and `T="auto"` exclude each other'),
        ({"storage": "memmap"}, '`in_background=True` and `storage="memmap"` exclude each other'),
        ({"num_workers": 0}, "`num_workers` has to be"),
    ],
)
def test_what_excludes_each_other(settings, text):
    with pytest.raises(ValueError, match=text):
        KnowledgeRefreshCallback(**({"T": 2, "in_background": True} | settings))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_precision_that_threads_share(precision):
    run = make_trainer(precision=precision, callbacks=[make_refresh(1, in_background=True)])
    with pytest.raises(RuntimeError, match=f'precision="{precision}" changes the default dtype'):
        run.fit(wrap(PlainTowers()), make_loader())


def test_models_that_are_divided_are_refused():
    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(RuntimeError, match="with FSDPStrategy no process has all of their weights"):
        check_background(Trainer())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(precision):
    """A stream of its own encodes what the foreground encodes."""

    class Wide(PlainTowers):
        def __init__(self):
            super().__init__()
            self.deep = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])

        def encode_audio(self, batch):
            return self.deep(super().encode_audio(batch))

    refresh, bases = Foreground(T, num_prototypes=6, in_background=True), Bases()
    run = make_trainer(max_epochs=EPOCHS, accelerator="gpu", precision=precision, callbacks=[refresh, bases])
    pl.seed_everything(1, verbose=False)
    run.fit(wrap(Wide()), make_loader())
    for step, base in enumerate(bases.bases):
        epoch = step // STEPS
        due = 0 if epoch < 3 else (epoch - 1) // T * T
        assert base.fine.audio.is_cuda
        torch.testing.assert_close(base.fine.audio, refresh.bases[due].fine.audio, atol=1e-6, rtol=0)
    assert len({base.fingerprint for base in bases.bases}) == 3
