"""A checkpoint that cannot be written costs nothing that was there."""

import errno
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ask_lightning.cli.checkpoint_io import AtomicCheckpointIO
from tests.helpers.command_line import BASELINE, ask_lightning, last_checkpoint, refusal


def full(self, content):
    self.touch()
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "last.ckpt"
    checkpoints = AtomicCheckpointIO()
    checkpoints.save_checkpoint({"epoch": 1}, path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*last\.ckpt"):
        checkpoints.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_options_of_a_remote_storage_are_refused_as_before(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"key": 1})


def test_a_fit_on_a_full_disk_keeps_its_last_checkpoint(demo, monkeypatch, capsys):
    given = ("fit", "--config", BASELINE, demo, "--run", "run", "--trainer.max_epochs")
    cli = ask_lightning(*given, 1)
    assert type(cli.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    before = last_checkpoint(Path("run")).read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    message = refusal(capsys, *given, 2, "--ckpt_path", "last")
    assert ".ckpt'. Free space there, or write to another disk." in message
    assert last_checkpoint(Path("run")).read_bytes() == before


def test_another_way_of_writing_that_is_asked_for_stays(demo):
    plugin = "lightning.pytorch.plugins.io.AsyncCheckpointIO"
    cli = ask_lightning(
        "fit", "--config", BASELINE, demo, "--trainer.max_epochs", 1, "--trainer.plugins", plugin
    )
    assert not isinstance(cli.trainer.strategy.checkpoint_io, TorchCheckpointIO)
