"""SLURM's signal before it takes the machine away, on which Lightning writes a checkpoint at any moment."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from ask_lightning import KnowledgeBase
from ask_lightning.callbacks import ClusterSignalCallback
from tests.helpers.clients import (
    AUDIO,
    WIDTH,
    Pairs,
    PlainTowers,
    assert_same_weights,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.interrupted_run import STEPS, fit


class Merging(nn.Linear):
    """A layer that merges an update into its weight for evaluation, as LoRA does."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.update = nn.Parameter(torch.full_like(self.weight, 0.01))
        self.merged = False

    def train(self, mode: bool = True):
        if mode == self.merged:
            self.weight.data += self.update.data * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, audio):
        return nn.functional.linear(audio, self.weight + (0 if self.merged else self.update), self.bias)


class Restless(PlainTowers):
    """Encoders that evaluation and encoding change."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.audio_encoder = Merging(AUDIO, WIDTH)
        self.register_buffer("encoded", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def encode_audio(self, batch):
        self.encoded += 1
        self.replaced = self.replaced + 1
        return super().encode_audio(batch)


class Signalling(Pairs):
    """A source that sends the signal when it has been read so often."""

    def __init__(self, at: int | None) -> None:
        super().__init__(48)
        self.at, self.count = at, 0

    def __getitem__(self, row):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().__getitem__(row)


@pytest.fixture(name="cluster")
def cluster_fixture(monkeypatch, tmp_path):
    """A job of one task of SLURM, whose checkpoints go here."""
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NODEID", "0")
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "scontrol").write_text("#!/bin/sh\n")
    (commands / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hpc_ckpt_1.ckpt"


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole"), model=Restless(), source=Signalling(None), epochs=4)


@pytest.mark.parametrize("epoch", [0, 2])
def test_in_a_refresh(epoch, cluster, whole):
    """The checkpoint has the weights and buffers of training; the refresh is made up for."""
    source = Signalling(48 * (epoch // 2) + 20)
    model, signalled, _ = fit(Path("run"), model=Restless(), source=source, epochs=4)
    assert signalled.losses == whole[1].losses
    assert_same_weights(model, whole[0])
    stored = torch.load(cluster, weights_only=True)["state_dict"]
    assert stored["encoded"] == stored["replaced"] == epoch * STEPS
    resumed, seen, _ = fit(
        Path("resumed"), model=Restless(), source=Signalling(None), epochs=4, resume=cluster
    )
    assert seen.losses == whole[1].losses[epoch * STEPS :]
    assert_same_weights(resumed, whole[0])


def test_while_the_knowledge_is_written(cluster, whole, monkeypatch, recwarn):
    save = KnowledgeBase.save

    def save_and_signal(base, path):
        if not cluster.exists():
            os.kill(os.getpid(), signal.SIGUSR1)
        save(base, path)

    monkeypatch.setattr(KnowledgeBase, "save", save_and_signal)
    fit(Path("run"), model=Restless(), source=Signalling(None), epochs=4)
    seen = fit(Path("resumed"), model=Restless(), source=Signalling(None), epochs=4, resume=cluster)[1]
    assert seen.losses == whole[1].losses[STEPS:]
    assert not [each for each in recwarn if "newly encoded" in str(each.message)]


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="this Lightning has none")
def test_signals_are_answered_behind_averages_of_weights(tmp_path):
    """Wherever the callback is placed; a checkpoint before them would lack the step's."""
    average, seen = pl.callbacks.EMAWeightAveraging(decay=0.9), []

    class Noting(ClusterSignalCallback):
        def _answer(self, trainer):
            if average._average_model is not None:
                seen.append((trainer.global_step, int(average._average_model.n_averaged)))

    callbacks = [Noting(), make_refresh(), ModelCheckpoint(tmp_path, every_n_train_steps=1), average]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(wrap(PlainTowers()), make_loader())
    assert seen == [(0, 0), *((step, step) for step in range(1, 7)), (6, 6)]
    assert isinstance(trainer.callbacks[-1], ModelCheckpoint)
