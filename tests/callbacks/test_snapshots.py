"""Snapshots are there as long as a checkpoint needs them, and no longer."""

import os
import re
import resource
import signal
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ask_lightning.callbacks.snapshots import SnapshotRecord, SnapshotWriter
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.checkpoint_directory import OF_DEEPSPEED
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.clients import PlainTowers, Watcher, make_loader, make_refresh, make_trainer, wrap
from tests.helpers.interrupted_run import fit as fit_and_keep_last
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_bases import build


def fit(
    *checkpoints: ModelCheckpoint,
    epochs: int = 6,
    resume: Path | None = None,
    extra=(),
    T: int = 1,
    plugins=None,
    **settings,
):
    pl.seed_everything(1, verbose=False)
    watcher = Watcher()
    callbacks = [make_refresh(T, **settings), watcher, *extra, *checkpoints]
    run = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, plugins=plugins)
    run.fit(wrap(PlainTowers()), make_loader(), ckpt_path=resume)
    return watcher


def snapshots(directory: Path) -> set[int]:
    """Epochs of whose knowledge there is a snapshot."""
    return {int(re.search(r"epoch=(\d+)", path.name)[1]) for path in directory.glob("*.safetensors")}


def needed(directory: Path) -> set[str]:
    """Names of the snapshots that the checkpoints name first."""
    states = [torch.load(path, weights_only=True) for path in directory.glob("**/*.ckpt")]
    return {Path(state["callbacks"]["KnowledgeRefreshCallback"]["snapshot"]).name for state in states}


def test_those_of_removed_checkpoints_go(tmp_path):
    fit(ModelCheckpoint(tmp_path, save_top_k=1, monitor=None, every_n_epochs=1))
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    assert snapshots(tmp_path) == {5}


def test_those_of_kept_checkpoints_stay(tmp_path):
    fit(ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=2, filename="{epoch}"))
    assert {path.name for path in tmp_path.glob("*.safetensors")} == needed(tmp_path)
    assert snapshots(tmp_path) == {1, 3, 5}


class Directories(TorchCheckpointIO):
    """Writes all but the optimisers where DeepSpeed does."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, Path(path) / OF_DEEPSPEED, storage_options)


def test_those_of_kept_directories_stay(tmp_path):
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=2, filename="{epoch}")
    fit(kept, plugins=[Directories()])
    assert all(path.is_dir() for path in tmp_path.glob("*.ckpt"))
    assert snapshots(tmp_path) == {1, 3, 5}


def test_those_of_removed_directories_go(tmp_path):
    fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1), plugins=[Directories()])
    assert snapshots(tmp_path) == {5}


def test_checkpoints_in_a_second_directory_and_below_count(tmp_path):
    """The snapshots lie beside the first callback's checkpoints."""
    fit(
        ModelCheckpoint(tmp_path / "last", save_top_k=1, every_n_epochs=1),
        ModelCheckpoint(tmp_path / "some", save_top_k=-1, every_n_epochs=3, filename="sub/{epoch}"),
    )
    assert snapshots(tmp_path / "last") == {2, 5}
    assert needed(tmp_path) <= {path.name for path in (tmp_path / "last").glob("*.safetensors")}


def test_a_kept_checkpoint_still_resumes_with_its_knowledge(tmp_path):
    whole = fit(ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=2, filename="{epoch}"), T=4)
    resumed = fit(ModelCheckpoint(tmp_path / "again"), resume=tmp_path / "epoch=1.ckpt", T=4)
    assert resumed.knowledge == whole.knowledge[2 * 6 :]
    assert resumed.losses == whole.losses[2 * 6 :]


def test_a_resumed_run_removes_what_the_first_one_wrote(tmp_path):
    fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1), epochs=3)
    assert snapshots(tmp_path) == {2}
    (last,) = tmp_path.glob("*.ckpt")
    fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1), resume=last)
    assert 5 in snapshots(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == needed(tmp_path)


class TakenAway(pl.Callback):
    """Does what Lightning does when a cluster takes the machine away."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "hpc_ckpt_1.ckpt")


def test_that_of_a_cluster_checkpoint_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(ModelCheckpoint(tmp_path / "some", save_top_k=1, every_n_epochs=1), extra=[TakenAway()])
    assert snapshots(tmp_path / "some") == {1, 5}


def test_a_run_that_goes_elsewhere_leaves_the_first_ones_snapshots(tmp_path):
    """Other checkpoints of the first run, in a directory that the second one does not know, may need them."""
    last, some = tmp_path / "a" / "last", tmp_path / "a" / "some"
    everything = {"save_top_k": -1, "every_n_epochs": 1, "filename": "{epoch}"}
    fit(ModelCheckpoint(last, every_n_epochs=2), ModelCheckpoint(some, **everything), epochs=3)
    before = snapshots(last)
    resume = some / "epoch=1.ckpt"
    second = ModelCheckpoint(tmp_path / "b", **everything)
    fit(ModelCheckpoint(last, every_n_epochs=2), second, resume=resume)
    assert snapshots(last) >= before == {0, 1, 2}


def test_a_snapshot_that_cannot_be_removed_does_not_end_training(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuse(self, missing_ok=False):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(UserWarning, match=r"superseded knowledge .* could not be removed"):
        run = fit(ModelCheckpoint(tmp_path), epochs=3)
    assert len(run.losses) == 18


def test_an_unreadable_checkpoint_of_another_time_is_told_once_and_keeps_nothing(tmp_path):
    (tmp_path / "old.ckpt").write_bytes(b"of another time")
    with pytest.warns(UserWarning, match=r"old.ckpt cannot be read .* Remove the file") as seen:
        fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1))
    assert sum("cannot be read" in str(each.message) for each in seen) == 1
    assert snapshots(tmp_path) == {5}


def test_an_unreadable_checkpoint_keeps_what_was_there_before_it(tmp_path):
    class Spoil(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                (tmp_path / "half.ckpt").write_bytes(b"half")

    with pytest.warns(UserWarning, match=r"half.ckpt cannot be read"):
        fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1), extra=[Spoil()])
    assert snapshots(tmp_path) == {2, 5}


def test_a_pile_that_nothing_removes_is_told_once(tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "elsewhere" / f"{trainer.current_epoch}.ckpt")

    run = make_trainer(max_epochs=6, callbacks=[make_refresh(1), Save()], default_root_dir=tmp_path)
    with pytest.warns(
        UserWarning, match=r"3 snapshots of superseded.*ModelCheckpoint.*save_knowledge"
    ) as seen:
        run.fit(wrap(PlainTowers()), make_loader())
    assert sum("snapshots of superseded" in str(each.message) for each in seen) == 1
    assert snapshots(tmp_path) == {0, 1, 2, 3, 4, 5}


def test_other_runs_snapshots_are_left_alone(tmp_path):
    (tmp_path / "knowledge-epoch=0-0123456789abcdef.safetensors").write_bytes(b"another run's")
    fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1))
    assert snapshots(tmp_path) == {0, 5}


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = []
    with atomic_write(tmp_path / "knowledge-epoch=0-1.safetensors") as temporary:
        for ending in (".tmp", ".lock"):
            left.append(temporary.with_name(temporary.name[: -4 - 32] + 32 * "0" + ending))
            left[-1].write_bytes(b"half")
        temporary.touch()
    mine = tmp_path / ".knowledge-epoch=0-1.safetensors.77.tmp"
    mine.touch()
    fit(ModelCheckpoint(tmp_path, save_top_k=1, every_n_epochs=1))
    assert [path.exists() for path in left] == [False, False]
    assert mine.exists()


def test_written_once_a_refresh(tmp_path, monkeypatch):
    written = []
    from ask_lightning.knowledge import base_file

    original = base_file.write_snapshot
    monkeypatch.setattr(
        base_file, "write_snapshot", lambda path, *rest: (written.append(path.name), original(path, *rest))
    )
    fit(
        ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2, save_last=True),
        ModelCheckpoint(tmp_path / "b", every_n_epochs=1),
        T=3,
    )
    assert [re.search(r"epoch=(\d)", name)[1] for name in written] == ["0", "3"]


def test_a_remote_directory_is_told_once(tmp_path, monkeypatch):
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1)
    monkeypatch.setattr("ask_lightning.callbacks.snapshots.local_path", lambda directory: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(keep, T=6)
    told = [str(warning.message) for warning in caught if "not a local directory" in str(warning.message)]
    assert len(told) == 1
    assert not list(tmp_path.glob("*.safetensors"))


def run_on_a_full_disk(directory: Path) -> None:
    """In a process of its own: no file may become larger than the checkpoints are."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ModelCheckpoint(directory, save_last=True), T=6, source=make_loader(1200).dataset, batch_size=8)
    told = [str(warning.message) for warning in caught if "could not be written" in str(warning.message)]
    assert len(told) == 1, told
    assert "Training goes on" in told[0]
    assert (directory / "last.ckpt").is_file()
    assert not list(directory.glob("*.safetensors"))
    assert not list(directory.glob(".*.tmp"))


def test_a_full_disk_costs_the_snapshot_and_nothing_else(tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            run_on_a_full_disk(tmp_path)
        except BaseException:
            import traceback

            (tmp_path / "error").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, (tmp_path / "error").read_text()


def test_one_flipped_bit_is_noticed(tmp_path):
    fit_and_keep_last(tmp_path, epochs=2)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"newly encoded knowledge.*damaged: the checksum of .* is another"):
        fit_and_keep_last(tmp_path / "again", resume=tmp_path / "last.ckpt", epochs=3)


def write_on_a_full_disk(folder: str) -> tuple[list[str], list[str]]:
    """Two refreshes; the disk of rank 1 is full at the first."""
    ranks, record, told = Ranks.current(), SnapshotRecord(), []
    for epoch in (0, 1):
        base = build(20 + epoch, "interleaved", placement="sharded")
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if (ranks.rank, epoch) == (1, 0):
                patch.setattr("ask_lightning.utilities.atomic_files.os.replace", _full)
            record.supersede()
            SnapshotWriter(record).write(base, epoch, Path(folder))
            told += [str(warning.message) for warning in caught]
        ranks.all_gather_object(None)
    return sorted(path.name for path in Path(folder).iterdir()), told


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_of_one_rank_leaves_no_shards(tmp_path):
    (left, told), (_, others) = on_ranks(2, write_on_a_full_disk, str(tmp_path))
    assert [name[: len("knowledge-epoch=1")] for name in left] == ["knowledge-epoch=1"] * 2
    assert len([text for text in told + others if "could not be written" in text]) == 1
