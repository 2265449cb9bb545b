"""A run that was stopped goes on with the same knowledge and the same next loss."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset

from ask_lightning import KnowledgeBase, KnowledgeRefreshCallback
from tests.helpers import interrupted_run
from tests.helpers.clients import (
    Pairs,
    PlainTowers,
    Watcher,
    assert_same_weights,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.interrupted_run import STEPS, Stop, Stopped, fit
from tests.helpers.ranks import python_path

RE_ENCODED = (
    r"The run resumes with newly encoded knowledge instead of that of epoch 2, so its losses differ from "
    r"those of a run without a break. "
)


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tmp_path_factory):
    """The run without a break."""
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.fixture(name="broken", scope="module")
def broken_fixture(tmp_path_factory):
    """The directory of a run that was stopped inside epoch 3; its last checkpoint ends epoch 2."""
    directory = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(Stopped):
        fit(directory, stop=Stop(3))
    return directory


@pytest.fixture(name="directory")
def directory_fixture(broken, tmp_path):
    """A copy of it to spoil."""
    shutil.copytree(broken, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    key = KnowledgeRefreshCallback.__qualname__
    state["callbacks"][key]["snapshot"] = str(next((tmp_path / "run").glob(_name(state))))
    torch.save(state, tmp_path / "run" / "last.ckpt")
    return tmp_path / "run"


def _name(state) -> str:
    return Path(state["callbacks"]["KnowledgeRefreshCallback"]["snapshot"]).name


def snapshot_of(directory: Path) -> Path:
    return directory / _name(torch.load(directory / "last.ckpt", weights_only=True))


def assert_goes_on(resumed, whole, first_epoch: int = 3) -> None:
    model, watcher, _ = resumed
    whole_model, before, _ = whole
    rest = slice(first_epoch * STEPS, None)
    assert watcher.clips == before.clips[rest]
    assert watcher.knowledge == before.knowledge[rest]
    assert watcher.losses == before.losses[rest]
    assert watcher.rates == before.rates[rest]
    assert_same_weights(model, whole_model)


def test_the_whole_run_refreshes_thrice(whole):
    _, watcher, _ = whole
    assert len(watcher.losses) == 36
    per_epoch = [set(watcher.knowledge[start : start + STEPS]) for start in range(0, 36, STEPS)]
    assert all(len(names) == 1 for names in per_epoch)
    assert per_epoch[0] == per_epoch[1] != per_epoch[2] == per_epoch[3] != per_epoch[4] == per_epoch[5]


def test_stopped_by_an_error(broken, whole, monkeypatch):
    refreshed = []
    original = KnowledgeRefreshCallback.refresh

    def spied(self, trainer, pl_module):
        refreshed.append(trainer.current_epoch)
        original(self, trainer, pl_module)

    monkeypatch.setattr(KnowledgeRefreshCallback, "refresh", spied)
    resumed = fit(broken.parent / "again", resume=broken / "last.ckpt")
    assert refreshed == [4], "not at the resume in epoch 3"
    assert_goes_on(resumed, whole)


def test_killed(whole, tmp_path):
    """By the signal that no process can answer, in the middle of epoch 3."""
    root = Path(interrupted_run.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, interrupted_run.__file__, tmp_path / "run", "3", "2"],
        env=os.environ | {"PYTHONPATH": python_path(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "run").glob("*.safetensors"))) == 1
    resumed = fit(tmp_path / "again", resume=tmp_path / "run" / "last.ckpt")
    assert_goes_on(resumed, whole)


def test_stopped_where_a_refresh_is_due(whole, tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop=Stop(4, 0))
    resumed = fit(tmp_path / "again", resume=tmp_path / "run" / "last.ckpt")
    assert_goes_on(resumed, whole, first_epoch=4)


def test_stopped_twice(whole, tmp_path):
    """The second break is before the next refresh: the snapshot in use is still the first run's."""
    with pytest.raises(Stopped):
        fit(tmp_path / "one", stop=Stop(2))
    with pytest.raises(Stopped):
        fit(tmp_path / "two", resume=tmp_path / "one" / "last.ckpt", stop=Stop(5))
    shutil.rmtree(tmp_path / "one")
    assert_goes_on(fit(tmp_path / "three", resume=tmp_path / "two" / "last.ckpt"), whole, first_epoch=5)


def test_snapshot_follows_into_a_new_directory(whole, tmp_path, recwarn):
    """Each directory of checkpoints can be moved or kept alone, also one in which nothing was refreshed."""
    with pytest.raises(Stopped):
        fit(tmp_path / "one", stop=Stop(3))
    with pytest.raises(Stopped):
        fit(tmp_path / "two", resume=tmp_path / "one" / "last.ckpt", stop=Stop(4, 0))
    shutil.rmtree(tmp_path / "one")
    resumed = fit(tmp_path / "three", resume=tmp_path / "two" / "last.ckpt")
    assert_goes_on(resumed, whole, first_epoch=4)
    assert not [warning for warning in recwarn if "newly encoded" in str(warning.message)]


def test_resume_of_the_last_by_its_alias(directory, whole):
    assert_goes_on(fit(directory, resume="last"), whole)


def test_moved_directory(directory, whole, tmp_path):
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    directory.rename(moved)
    assert_goes_on(fit(tmp_path / "again", resume=moved / "last.ckpt"), whole)


def test_relative_root_directory_resumed_from_elsewhere(whole, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    module = wrap(PlainTowers())
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(2)], default_root_dir="relative")
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "home" / "kept.ckpt")
    monkeypatch.chdir(tmp_path / "home")
    watcher = Watcher()
    again = make_trainer(max_epochs=2, callbacks=[make_refresh(2), watcher])
    again.fit(wrap(PlainTowers()), make_loader(), ckpt_path="kept.ckpt")
    assert set(watcher.knowledge) == {module.loss.knowledge.fingerprint}


def spoil_missing(path: Path) -> None:
    path.unlink()


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_to_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def spoil_empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def spoil_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_width(path: Path) -> None:
    path.unlink()
    audio, text = torch.randn(2, 48, 5)
    KnowledgeBase.from_embeddings(audio, text, num_prototypes=6).save(path)


def spoil_values(path: Path) -> None:
    base = KnowledgeBase.load(path)
    path.unlink()
    KnowledgeBase.from_embeddings(base.fine.text, base.fine.audio, num_prototypes=6).save(path)


def spoil_format(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_missing, r"There is no knowledge snapshot at .*\.safetensors"),
        (spoil_directory, r"There is no knowledge snapshot at .*\.safetensors"),
        (spoil_truncated, r"The knowledge snapshot .* is damaged"),
        (spoil_to_its_header, r"The knowledge snapshot .* is damaged"),
        (spoil_empty, r"The knowledge snapshot .* is damaged"),
        (spoil_garbage, r"The knowledge snapshot .* is damaged"),
        (spoil_width, r"width 5.* which is not the knowledge that the checkpoint names"),
        (spoil_values, r"width 8.* which is not the knowledge that the checkpoint names"),
        (spoil_format, r"not a knowledge snapshot that this version reads"),
    ],
)
def test_spoiled_snapshot(spoil, text, directory, whole, tmp_path):
    spoil(snapshot_of(directory))
    with pytest.warns(UserWarning, match=RE_ENCODED + ".*" + text):
        _, watcher, _ = fit(tmp_path / "again", resume=directory / "last.ckpt", epochs=5)
    before = whole[1]
    assert len(watcher.losses) == 12
    assert watcher.clips == before.clips[18:30]
    assert watcher.losses[0] != before.losses[18]
    assert None not in watcher.knowledge, "never an empty base"
    assert before.knowledge[18] not in watcher.knowledge
    assert len(set(watcher.knowledge)) == 2, "encoded at the resume in epoch 3, and in 4"


def test_without_a_saved_base(whole, tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop=Stop(3), save_knowledge=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.warns(UserWarning, match=RE_ENCODED + r".*without its knowledge \(`save_knowledge=False`\)"):
        _, watcher, _ = fit(tmp_path / "again", resume=tmp_path / "run" / "last.ckpt", epochs=4)
    assert len(watcher.losses) == 6
    assert None not in watcher.knowledge


@pytest.mark.parametrize("where", ["write", "flush", "rename", "library"])
def test_snapshot_that_cannot_be_written(where, whole, tmp_path, monkeypatch):
    """A full disk or a read-only directory costs the snapshot, not the run."""
    from safetensors import SafetensorError

    from ask_lightning.knowledge import snapshot_file

    def fail(*args, **kwargs):
        raise SafetensorError("io error: no space") if where == "library" else OSError(28, "No space left")

    if where in ("write", "library"):
        monkeypatch.setattr(snapshot_file, "save_file", fail)
    else:
        monkeypatch.setattr(
            "ask_lightning.utilities.atomic_files.os." + {"flush": "fsync", "rename": "replace"}[where], fail
        )
        # Lightning's own files are written by torch, which uses neither.
    with pytest.warns(
        UserWarning,
        match=r"The knowledge of epoch 0 could not be written \(.*[nN]o space.*\). Training goes on; a run",
    ):
        _, watcher, _ = fit(tmp_path / "run", epochs=3)
    assert watcher.losses == whole[1].losses[:18]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"newly encoded.*There is no knowledge snapshot"):
        fit(tmp_path / "again", resume=tmp_path / "run" / "last.ckpt", epochs=4)


def test_directory_that_nobody_can_make(tmp_path):
    """A file where the directory should be; the checkpoint itself goes elsewhere."""
    (tmp_path / "occupied").write_text("")
    module = wrap(PlainTowers())
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()], default_root_dir=tmp_path / "occupied")
    run.fit(module, make_loader())
    with pytest.warns(UserWarning, match="could not be written"):
        run.save_checkpoint(tmp_path / "kept.ckpt")
    PlainTowers.load_from_checkpoint(tmp_path / "kept.ckpt")


def test_failing_copy_into_a_new_directory_leaves_the_old_snapshot_in_use(
    directory, whole, tmp_path, monkeypatch
):
    def fail(self, path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(KnowledgeBase, "save", fail)
    with pytest.warns(UserWarning, match="could not be written"), pytest.raises(Stopped):
        fit(tmp_path / "two", resume=directory / "last.ckpt", stop=Stop(4, 0))
    monkeypatch.undo()
    resumed = fit(tmp_path / "three", resume=tmp_path / "two" / "last.ckpt")
    assert_goes_on(resumed, whole, first_epoch=4)


@pytest.mark.parametrize("step", [8, 15])
def test_checkpoints_inside_an_epoch(step, tmp_path):
    """Lightning begins the epoch's batches anew there; with the switches off, ASK does just the same."""

    saved = {}
    for name, options in {"plain": {"ask": False}, "neutral": {"neutral": True}}.items():
        with pytest.raises(Stopped):
            fit(tmp_path / name, every_n_train_steps=1, stop=Stop(step // 6, step % 6), **options)
        path = tmp_path / name / "last.ckpt"
        assert torch.load(path, weights_only=True)["global_step"] == step
        saved[name] = fit(tmp_path / f"{name} again", resume=path, epochs=4, **options)
    assert saved["neutral"][1].losses == saved["plain"][1].losses
    assert saved["neutral"][1].clips == saved["plain"][1].clips
    assert_same_weights(saved["neutral"][0], saved["plain"][0])


@pytest.mark.parametrize("step", [8, 12, 15, 21, 24])
def test_knowledge_of_a_checkpoint_inside_an_epoch(step, whole, tmp_path):
    with pytest.raises(Stopped):
        fit(tmp_path / "run", every_n_train_steps=1, stop=Stop(step // 6, step % 6))
    _, watcher, _ = fit(tmp_path / "again", resume=tmp_path / "run" / "last.ckpt")
    before = whole[1]
    assert watcher.knowledge[0] == before.knowledge[step], "the snapshot, not a new base"
    names = list(dict.fromkeys(watcher.knowledge))
    assert len(names) == len(set(before.knowledge[step:])), "and renewed when it is due again"


def test_stateful_loader_resumes_inside_an_epoch_exactly(whole, tmp_path):
    """With a loader that Lightning can put back to where it was, losses go on bit for bit."""

    class Position(torch.utils.data.DataLoader):
        """Skips what was read, once, after a resume."""

        offset = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            object.__setattr__(self, "read", 0)

        def __iter__(self):
            skip, self.offset = self.offset, 0
            for number, batch in enumerate(super().__iter__()):
                self.read = number + 1
                if number >= skip:
                    yield batch

        def state_dict(self):
            return {"read": self.read}

        def load_state_dict(self, state):
            self.offset = state["read"]

    def run(directory, ask, resume=None, stop=None):
        pl.seed_everything(1, verbose=False)
        model, watcher = PlainTowers(), Watcher()
        like = make_loader()
        data = Position(like.dataset, 8, sampler=like.sampler, drop_last=True)
        keep = ModelCheckpoint(directory, save_last=True, every_n_train_steps=1)
        refresh = make_refresh(2, like.dataset)
        callbacks = [watcher, *([refresh] if ask else []), *([stop] if stop else []), keep]
        going = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        going.fit(wrap(model) if ask else model, data, ckpt_path=resume)
        return model, watcher

    def broken(ask):
        name = f"{ask}"
        with pytest.raises(Stopped):
            run(tmp_path / name, ask, stop=Stop(3, 3))
        return run(tmp_path / f"{name} again", ask, resume=tmp_path / name / "last.ckpt")

    plain = run(tmp_path / "plain whole", ask=False)
    plain_resumed = broken(ask=False)
    if plain_resumed[1].losses != plain[1].losses[21:]:
        pytest.skip("this Lightning does not resume the plain model exactly inside an epoch")
    _, watcher = broken(ask=True)
    assert watcher.losses == whole[1].losses[21:24]
    assert watcher.knowledge == whole[1].knowledge[21:24]


def test_reused_trainer_whose_snapshot_is_gone_encodes_anew(tmp_path):
    """The base that is left over from the crash is not the one that the warning promises."""
    pl.seed_everything(1, verbose=False)
    module, watcher = wrap(PlainTowers()), Watcher()
    keep = ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1)
    stop = Stop(3)
    callbacks = [make_refresh(2, save_knowledge=False), watcher, stop, keep]
    run = make_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(Stopped):
        run.fit(module, make_loader())
    left_over = module.loss.knowledge.fingerprint
    stop.epoch = -1
    with pytest.warns(UserWarning, match="newly encoded knowledge instead of that of epoch 0"):
        run.fit(module, make_loader(), ckpt_path=tmp_path / "run" / "epoch=0.ckpt")
    resumed = watcher.knowledge[22:]
    assert left_over not in resumed[:STEPS]


def test_state_of_a_checkpoint_that_never_trained_is_forgotten(directory, whole, recwarn):
    """A resume that fails before its first step must not reach into the next run of the callback."""

    class Fails(PlainTowers):
        def on_fit_start(self):
            raise Stopped

    callback = make_refresh(2)
    with pytest.raises(Stopped):
        make_trainer(callbacks=[callback]).fit(
            wrap(Fails()), make_loader(), ckpt_path=directory / "last.ckpt"
        )
    snapshot_of(directory).unlink()
    pl.seed_everything(1, verbose=False)
    watcher = Watcher()
    make_trainer(max_epochs=1, callbacks=[callback, watcher]).fit(wrap(PlainTowers()), make_loader())
    assert watcher.losses == whole[1].losses[:STEPS]
    assert watcher.knowledge == whole[1].knowledge[:STEPS]
    assert not [warning for warning in recwarn if "newly encoded" in str(warning.message)]


def test_validating_a_checkpoint_does_not_touch_the_base(broken):
    class Client(PlainTowers):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    module = wrap(Client())
    run = make_trainer(callbacks=[make_refresh(2)])
    run.validate(module, make_loader(16), ckpt_path=broken / "last.ckpt", verbose=False)
    assert module.loss.knowledge is None


def test_on_exception_checkpoint(whole, tmp_path):
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    pl.seed_everything(1, verbose=False)
    callbacks = [make_refresh(2), Stop(3), OnExceptionCheckpoint(tmp_path)]
    run = make_trainer(max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(Stopped):
        run.fit(wrap(PlainTowers()), make_loader())
    (path,) = tmp_path.glob("*.ckpt")
    _, watcher, _ = fit(tmp_path / "again", resume=path, epochs=4)
    assert watcher.knowledge[0] == whole[1].knowledge[21]


def test_a_refresh_that_was_interrupted_is_made_up_for(whole, tmp_path):
    """Lightning resumes inside the epoch whose start had been reached, and leaves the start out."""
    from lightning.pytorch.callbacks import OnExceptionCheckpoint

    class Interrupted(KnowledgeRefreshCallback):
        def refresh(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                raise Stopped
            super().refresh(trainer, pl_module)

    pl.seed_everything(1, verbose=False)
    callbacks = [Interrupted(2, num_prototypes=6), OnExceptionCheckpoint(tmp_path)]
    run = make_trainer(max_epochs=6, callbacks=callbacks, enable_checkpointing=True)
    with pytest.raises(Stopped):
        run.fit(wrap(PlainTowers()), make_loader())
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)
    state["callbacks"]["KnowledgeRefreshCallback"] = state["callbacks"].pop(Interrupted.__qualname__)
    torch.save(state, path)
    _, watcher, _ = fit(tmp_path / "again", resume=path, epochs=4)
    assert watcher.knowledge == whole[1].knowledge[12:24]
    assert watcher.losses == whole[1].losses[12:24], "no batch of the epoch is left out"


def test_state_is_made_of_what_a_safe_load_accepts(broken):
    state = torch.load(broken / "last.ckpt", weights_only=True)["callbacks"]["KnowledgeRefreshCallback"]
    assert {name: type(value) for name, value in state.items()} == {
        "built_at": int,
        "snapshot": str,
        "other_snapshots": list,
        "checkpoint_directories": list,
        "fingerprint": str,
        "settings": dict,
        "source": dict,
        "training_data": type(None),
        "encoded_at": type(None),
        "decided_at": int,
        "schedule": type(None),
        "in_flight": type(None),
    }
    assert Path(state["snapshot"]).is_absolute()


class OfAnotherClass(Pairs):
    pass


OTHER_SOURCES = {
    "length": lambda: DataLoader(Pairs(40), 8),
    "class": lambda: DataLoader(OfAnotherClass(48), 8),
    "clips": lambda: DataLoader(Pairs(96, captions_per_clip=2), 8),
    "selection": lambda: DataLoader(Subset(Pairs(96), [0, *range(50, 96), 47]), 8),
}


@pytest.mark.parametrize("what", ["length", "class", "same", "clips", "selection"])
@pytest.mark.parametrize("how", ["checkpoint", "fit again"])
def test_another_source_is_noticed(what, how, tmp_path, recwarn):
    first = DataLoader(Pairs(96) if what == "clips" else Pairs(48), 8)
    first = DataLoader(Subset(Pairs(96), range(48)), 8) if what == "selection" else first
    second = first if what == "same" else OTHER_SOURCES[what]()
    module, watcher, refresh = wrap(PlainTowers(), ids="clip_id"), Watcher(), make_refresh(5)
    run = make_trainer(max_epochs=1, callbacks=[refresh, watcher])
    run.fit(module, first)
    before = watcher.knowledge[-1]
    if how == "fit again":
        run.fit_loop.max_epochs = 2
        run.fit(module, second)
    else:
        run.save_checkpoint(tmp_path / "a.ckpt")
        module = wrap(PlainTowers(), ids="clip_id")
        run = make_trainer(max_epochs=2, callbacks=[make_refresh(5), watcher])
        run.fit(module, second, ckpt_path=tmp_path / "a.ckpt")
    told = any("The knowledge source is another one" in str(each.message) for each in recwarn)
    assert told == (what != "same")
    assert (watcher.knowledge[-1] != before) == (what != "same")
    assert len(module.loss.knowledge.fine) == len(second.dataset)
