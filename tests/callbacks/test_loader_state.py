"""Stateful training loaders go on at their place: a resume inside an epoch equals a run without a break."""

import os
import signal
import subprocess
import sys
import warnings
from functools import cache, partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from ask_lightning.callbacks import LoaderStateCallback, RandomStateCallback
from ask_lightning.callbacks.loader_state import warn_of_order
from tests.helpers import stateful_run
from tests.helpers.clients import Pairs, PlainTowers, make_loader, make_refresh, make_trainer, wrap
from tests.helpers.interrupted_run import Stop, Stopped
from tests.helpers.ranks import python_path
from tests.helpers.stateful_run import EPOCHS, STEPS, fit, make_stateful
from tests.helpers.streams import write_chunks

LAST = EPOCHS * STEPS - 1  # whose row holds the end of the epoch alone
KINDS = ["shuffle", "generator", "epoch sampler", "stream", "sized stream"]


@pytest.fixture(name="torchdata")
def torchdata_fixture():
    return pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")


@cache
def whole(kind: str, loss: str = "reliability") -> dict:
    """The run without a break."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return fit(Path(directory), partial(make_stateful, kind), loss)


def assert_goes_on(resumed: dict, unbroken: dict, step: int) -> None:
    """Bit for bit what the run without a break does from this step on."""
    for name in ("clips", "losses", "knowledge"):
        assert resumed[name] == unbroken[name][step:], name
    torch.testing.assert_close(resumed["tensors"], unbroken["tensors"], rtol=0, atol=0)
    # Lightning writes values that are not of every step again at the next one; after a break it has none.
    of_this_epoch, later = range(step, step - step % STEPS + STEPS), range(-(-step // STEPS) * STEPS, LAST)
    for at in of_this_epoch:
        assert resumed["logged"][at].items() <= unbroken["logged"][at].items()
    assert [resumed["logged"][at] for at in later] == [unbroken["logged"][at] for at in later]


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("kind", "loss"), [("shuffle", "reliability"), ("epoch sampler", "queue"), ("stream", "queue")]
)
@pytest.mark.usefixtures("torchdata")
def test_killed_inside_an_epoch(kind, loss, tmp_path):
    """By the signal that no process can answer; the last checkpoint is that of the step before."""
    script = Path(stateful_run.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run", kind, loss, "2", "3"],
        env=os.environ | {"PYTHONPATH": python_path(script.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoint = tmp_path / "run" / "last.ckpt"
    assert step_of(checkpoint) == 2 * STEPS + 3
    resumed = fit(tmp_path / "run", partial(make_stateful, kind), loss, resume="last")
    assert_goes_on(resumed, whole(kind, loss), 2 * STEPS + 3)


@pytest.mark.parametrize(
    ("kind", "epoch", "batch", "every"),
    [
        *(pytest.param(kind, 1, 3, 1, id=f"{kind}, inside") for kind in ("generator", "sized stream")),
        *(pytest.param(kind, 2, 0, 1, id=f"{kind}, at the last step") for kind in KINDS),
        *(pytest.param(kind, 2, 2, None, id=f"{kind}, at the end") for kind in ("shuffle", "stream")),
    ],
)
@pytest.mark.usefixtures("torchdata")
def test_stopped_anywhere(kind, epoch, batch, every, tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, partial(make_stateful, kind), stop=Stop(epoch, batch), every_n_train_steps=every)
    step = step_of(tmp_path / "last.ckpt")
    assert step == (2 * STEPS if every is None else epoch * STEPS + batch)
    resumed = fit(
        tmp_path, partial(make_stateful, kind), resume=tmp_path / "last.ckpt", every_n_train_steps=every
    )
    assert_goes_on(resumed, whole(kind), step)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shuffle", "epoch sampler", "stream"])
@pytest.mark.usefixtures("torchdata")
def test_stopped_with_workers(kind, tmp_path):
    unbroken = fit(tmp_path / "whole", partial(make_stateful, kind, num_workers=2))
    with pytest.raises(Stopped):
        fit(tmp_path / "run", partial(make_stateful, kind, num_workers=2), stop=Stop(1, 3))
    resumed = fit(tmp_path / "run", partial(make_stateful, kind, num_workers=2), resume="last")
    assert_goes_on(resumed, unbroken, STEPS + 3)


@pytest.fixture(name="make_chunked", scope="module")
def make_chunked_fixture(tmp_path_factory):
    """What makes a loader of litdata over chunks of 48 pairs."""
    litdata = pytest.importorskip("litdata", reason="litdata is not installed")
    chunks = write_chunks(tmp_path_factory.mktemp("chunks"), 48)

    def make(shuffle: bool, num_workers: int = 0):
        dataset = litdata.StreamingDataset(chunks, shuffle=shuffle, drop_last=True)
        return litdata.StreamingDataLoader(dataset, batch_size=8, num_workers=num_workers)

    return make


@pytest.mark.parametrize(
    ("shuffle", "num_workers", "epoch", "batch", "limit"),
    [
        pytest.param(True, 0, 0, 2, None, id="in the first epoch"),
        pytest.param(True, 0, 1, 3, None, id="inside"),
        pytest.param(False, 0, 1, 3, None, id="inside, in order"),
        pytest.param(True, 2, 2, 5, None, id="inside, with workers"),
        pytest.param(True, 0, 2, 0, None, id="at the last step"),
        pytest.param(True, 0, 1, 2, 4, id="inside, epochs that are left"),
        pytest.param(True, 0, 2, 0, 4, id="at the last step, epochs that are left"),
    ],
)
def test_loader_of_litdata(make_chunked, shuffle, num_workers, epoch, batch, limit, tmp_path):
    make = partial(make_chunked, shuffle, num_workers)
    unbroken = fit(tmp_path / "whole", make, limit=limit)
    assert len(unbroken["clips"]) == EPOCHS * (limit or STEPS)
    with pytest.raises(Stopped):
        fit(tmp_path / "run", make, stop=Stop(epoch, batch), limit=limit)
    step = step_of(tmp_path / "run" / "last.ckpt")
    assert step == epoch * (limit or STEPS) + batch
    resumed = fit(tmp_path / "run", make, resume="last", limit=limit)
    assert resumed["clips"] == unbroken["clips"][step:]
    assert resumed["losses"] == unbroken["losses"][step:]


def resumed_twice(kind, tmp_path):
    """Stopped in epoch 1, and the resumed run in epoch 3."""
    with pytest.raises(Stopped):
        fit(tmp_path, partial(make_stateful, kind), stop=Stop(1, 3))
    with pytest.raises(Stopped):
        fit(tmp_path, partial(make_stateful, kind), resume="last", stop=Stop(1, 4))
    step = step_of(tmp_path / "last.ckpt")
    return step, fit(tmp_path, partial(make_stateful, kind), resume=tmp_path / "last.ckpt")


@pytest.mark.parametrize("kind", ["shuffle", "stream"])
@pytest.mark.usefixtures("torchdata")
def test_stopped_again_at_the_next_step(kind, tmp_path):
    step, resumed = resumed_twice(kind, tmp_path)
    assert step == STEPS + 4 or kind == "stream"
    assert_goes_on(resumed, whole(kind), step)


class Counting(DataLoader):
    """A stateful loader of one's own: it counts its batches, and skips those that it has yielded before."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.yielded = self.skip = 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            self.yielded = number + 1
            if number >= skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"yielded": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["yielded"]


def counting() -> Counting:
    like = make_loader()
    return Counting(like.dataset, 8, sampler=like.sampler)


@pytest.mark.parametrize(("epoch", "batch"), [(1, 3), (2, 0)])
def test_a_loader_of_ones_own(epoch, batch, tmp_path):
    source = Pairs(48)
    unbroken = fit(tmp_path / "whole", counting, source=source)
    with pytest.raises(Stopped):
        fit(tmp_path / "run", counting, stop=Stop(epoch, batch), source=source)
    resumed = fit(tmp_path / "run", counting, resume="last", source=source)
    assert_goes_on(resumed, unbroken, epoch * STEPS + batch)


@pytest.mark.parametrize("kind", ["generator", "epoch sampler", "stream", "own"])
def test_epochs_that_are_left_before_their_end(kind, tmp_path, request):
    """By `limit_train_batches`: the next epoch begins anew instead of with the rest of the one before."""
    if kind != "own":
        request.getfixturevalue("torchdata")
    make = counting if kind == "own" else partial(make_stateful, kind)
    settings, step = {"limit": 4, "source": Pairs(48), "epochs": 3}, 8
    unbroken = fit(tmp_path / "whole", make, **settings)
    with pytest.raises(Stopped):
        fit(tmp_path / "run", make, stop=Stop(2, 0), **settings)
    resumed = fit(tmp_path / "run", make, resume="last", **settings)
    assert resumed["steps"] == unbroken["steps"] == 12
    for name in ("clips", "losses", "knowledge"):
        assert resumed[name] == unbroken[name][step:], name
    torch.testing.assert_close(resumed["tensors"], unbroken["tensors"], rtol=0, atol=0)


def test_a_checkpoint_inside_a_step_says_what_it_leaves_out(tmp_path):
    class Saves(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    callbacks = [make_refresh(2, Pairs(48)), LoaderStateCallback(), Saves()]
    run = make_trainer(max_epochs=2, callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"inside the training step of batch 2 of epoch 1.*leaves that"):
        run.fit(wrap(PlainTowers()), counting())


def test_a_checkpoint_amid_accumulated_gradients_says_what_it_lacks(tmp_path):
    def warnings_behind(batch: int) -> list[str]:
        save = SaveAt(tmp_path / "amid.ckpt", batch)
        callbacks = [make_refresh(2, Pairs(48)), LoaderStateCallback(), save]
        run = make_trainer(max_epochs=2, callbacks=callbacks, accumulate_grad_batches=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(wrap(PlainTowers()), counting())
        return [str(each.message) for each in caught if "accumulate_grad_batches" in str(each.message)]

    (told,) = warnings_behind(4)
    assert "behind batch 4 of epoch 0, whose gradients wait" in told
    assert not warnings_behind(3) + warnings_behind(5)  # of six: a whole step, and the rest of the epoch


def test_a_loader_without_state_is_refused():
    run = make_trainer(callbacks=[make_refresh(), LoaderStateCallback()])
    with pytest.raises(
        RuntimeError, match=r"needs a training loader with `state_dict`.* got DataLoader\. Use"
    ):
        run.fit(wrap(PlainTowers()), make_loader())


class BrokenStart(pl.Callback):
    """Fails once, behind the reading of the checkpoint."""

    is_broken = True

    def on_fit_start(self, trainer, pl_module):
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("broken")


@pytest.mark.usefixtures("torchdata")
def test_a_resume_that_was_broken_off_leaves_nothing_to_the_next_run(tmp_path):
    fit(tmp_path, partial(make_stateful, "shuffle"), epochs=1)
    callbacks = [make_refresh(), LoaderStateCallback(), BrokenStart()]
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(callbacks=callbacks).fit(
            wrap(PlainTowers(), ids="clip_id"), make_stateful("shuffle"), ckpt_path=tmp_path / "last.ckpt"
        )
    run = make_trainer(max_epochs=1, callbacks=callbacks)
    run.fit(wrap(PlainTowers(), ids="clip_id"), make_stateful("shuffle"))
    assert run.global_step == STEPS


def test_another_number_of_processes(tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path, counting, stop=Stop(1, 3), source=Pairs(48))
    path = tmp_path / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["callbacks"]["LoaderStateCallback"]["ranks"] *= 2
    torch.save(state, path)
    with pytest.warns(UserWarning, match="resumes on 1 processes with the place in the data of 2"):
        fit(tmp_path, counting, resume=path, epochs=2, source=Pairs(48))


class NumberedTowers(PlainTowers):
    """Notes the epoch, the number and the clips of each batch, which may be one of several loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = batch if "first" in batch else {"only": batch}
        clips = {name: None if part is None else part["clip_id"].tolist() for name, part in parts.items()}
        self.seen.append((self.current_epoch, batch_idx, clips))
        return super().training_step(parts.get("second", batch), batch_idx)


class SaveAt(pl.Callback):
    """Writes a checkpoint after a batch of the first epoch."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (0, self.batch):
            trainer.save_checkpoint(self.path)


def numbered(make, path: Path, batch: int, **settings) -> tuple[NumberedTowers, NumberedTowers]:
    """Two epochs without ASK, of which the place of loaders is independent, and the part after a batch."""
    models = NumberedTowers(), NumberedTowers()
    for model, resume in zip(models, (None, path), strict=True):
        pl.seed_everything(1, verbose=False)
        model.load_state_dict(models[0].state_dict())
        callbacks = [LoaderStateCallback(), *([] if resume else [SaveAt(path, batch)])]
        make_trainer(max_epochs=2, callbacks=callbacks, **settings).fit(model, make(), ckpt_path=resume)
    return models


@pytest.mark.usefixtures("torchdata")
def test_batches_of_a_stream_are_numbered_from_zero_after_the_end_of_an_epoch(tmp_path):
    """By their numbers Lightning knows when accumulated gradients make a step: here after four and six."""
    make = partial(make_stateful, "stream")
    unbroken, resumed = numbered(make, tmp_path / "end.ckpt", STEPS - 1, accumulate_grad_batches=4)
    assert resumed.seen == unbroken.seen[STEPS:]
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


def two_loaders(mode: str, kind: str = "sized") -> CombinedLoader:
    from torchdata.stateful_dataloader import StatefulDataLoader

    first = StatefulDataLoader(Pairs(24), 8, shuffle=True)
    second = StatefulDataLoader(Pairs(40), 8, shuffle=True)
    if kind == "stream":
        second = make_stateful("stream")
    return CombinedLoader({"first": first, "second": second}, mode)


@pytest.mark.parametrize(
    ("mode", "kind", "batch"),
    [
        ("max_size_cycle", "sized", 3),
        ("max_size_cycle", "sized", 4),
        ("max_size_cycle", "stream", 4),
        ("max_size", "sized", 3),
        ("max_size", "sized", 4),
        ("max_size", "stream", 3),
    ],
)
@pytest.mark.usefixtures("torchdata")
def test_two_loaders_of_which_one_has_ended(mode, kind, batch, tmp_path):
    """The first has three batches; then it begins again, or gives none."""
    unbroken, resumed = numbered(partial(two_loaders, mode, kind), tmp_path / "two.ckpt", batch)
    assert resumed.seen == unbroken.seen[batch + 1 :]


@pytest.mark.parametrize(
    "kinds",
    [
        [LoaderStateCallback],
        [RandomStateCallback],
        [LoaderStateCallback, RandomStateCallback],
        [RandomStateCallback, LoaderStateCallback],
    ],
)
def test_loaders_that_are_made_anew_are_pointed_at_once(kinds):
    run = make_trainer(
        max_steps=1,
        callbacks=[make_refresh(2, Pairs(48)), *(kind() for kind in kinds)],
        reload_dataloaders_every_n_epochs=1,
    )
    told = "reload_dataloaders_every_n_epochs=1 a resumed run makes"
    with pytest.warns(UserWarning, match=told) as seen:
        run.fit(wrap(PlainTowers()), counting())
    assert sum(told in str(each.message) for each in seen) == 1


def test_an_end_that_may_not_be_part_of_the_state_is_pointed_at():
    run = make_trainer(max_steps=1, callbacks=[LoaderStateCallback()])
    loaders = CombinedLoader({"first": counting(), "second": counting()}, "max_size")
    with pytest.warns(UserWarning, match=r"'max_size', and the state of Counting may not.*max_size_cycle"):
        run.fit(NumberedTowers(), loaders)


@pytest.mark.usefixtures("torchdata")
def test_an_order_that_cannot_be_made_again_is_pointed_at(torchdata):
    pairs = Pairs(48)
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(), LoaderStateCallback()])
    loader = torchdata.StatefulDataLoader(pairs, 8, sampler=RandomSampler(pairs))
    with pytest.warns(UserWarning, match=r"The order of RandomSampler is not part of .*shuffle=True"):
        run.fit(wrap(PlainTowers()), loader)


def test_an_order_from_the_global_stream_that_lightning_divides_is_pointed_at(torchdata):
    divided = DistributedSamplerWrapper(WeightedRandomSampler(torch.ones(48), 48), num_replicas=2, rank=0)
    with pytest.warns(UserWarning, match=r"WeightedRandomSampler, divided among processes.*Use Stateful"):
        warn_of_order(torchdata.StatefulDataLoader(Pairs(48), 8, sampler=divided))


@pytest.mark.usefixtures("torchdata")
@pytest.mark.parametrize("kind", KINDS)
def test_orders_that_are_part_of_the_state_are_not(kind, recwarn, tmp_path):
    fit(tmp_path, partial(make_stateful, kind), epochs=1)
    assert not [each for each in recwarn if "is not part of" in str(each.message)]


class Endless(stateful_run.Stream):
    """Without a length, in a loader without a state."""


@pytest.mark.parametrize(
    ("make", "words"), [(counting, "LoaderStateCallback"), (None, "begins at its start")]
)
def test_a_resume_that_is_not_exact_is_pointed_at(make, words, tmp_path):
    def fit_plain(**settings) -> None:
        keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        run = make_trainer(
            callbacks=[make_refresh(2, Pairs(48)), keep], enable_checkpointing=True, **settings
        )
        loader = make() if make else DataLoader(Endless(), 8)
        path = tmp_path / "last.ckpt"
        run.fit(wrap(PlainTowers()), loader, ckpt_path=path if path.exists() else None)

    fit_plain(max_steps=9)
    with pytest.warns(UserWarning, match=f"The run resumes inside an epoch.*{words}"):
        fit_plain(max_steps=10)
