"""What runs leave behind, and that runs which were stopped go on."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ask_lightning.models import ResNet38BERT
from tests.helpers.command_line import (
    ASK,
    BASELINE,
    ask_lightning,
    last_checkpoint,
    logged,
    refusal,
    started,
    wait_for,
)


@pytest.fixture(scope="module")
def uninterrupted(demo, tmp_path_factory) -> Callable[..., Path]:
    """Makes the folder of a run of so many epochs, once for all tests that compare with it."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def make(epochs: int, name: str, *options: object) -> Path:
        run = folder / f"{name}-{epochs}"
        ask_lightning("fit", "--config", name, demo, "--run", run, *options, "--trainer.max_epochs", epochs)
        return run

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_validate_repeats_what_fit_has_logged(demo, trained):
    cli = ask_lightning(
        "validate", "--config", ASK, demo, "--run", "again", "--ckpt_path", last_checkpoint(trained)
    )
    expected = logged(trained)["val/mean_recall"][-1]
    assert cli.trainer.callback_metrics["val/mean_recall"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "flag", [("--model.padding", "masked"), ("--model.init_args.padding=masked",), ("--model.width", 12)]
)
def test_flags_of_the_model_that_a_checkpoint_overrules_are_told(flag, demo, trained, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("ask_lightning.cli.model_section.rank_zero_info", said.append)
    given = ("--config", ASK, demo, "--run", "again", "--ckpt_path", last_checkpoint(trained))
    for flags, is_told in ((flag, True), ((), False)):
        ask_lightning("validate", *given, *flags)
        told = [line for line in said if line.startswith("The model is built as its checkpoint says: ")]
        assert bool(told) == is_told
        said.clear()


def test_a_checkpoint_loads_in_its_class_and_tells_its_sizes(demo, tmp_path):
    ask_lightning(
        "fit", "--config", ASK, demo, "--run", "run", "--model.width", 12, "--trainer.max_epochs", 1
    )
    model = ResNet38BERT.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert model.audio_head[-1].out_features == 12
    cli = ask_lightning("test", "--config", BASELINE, demo, "--ckpt_path", "run/checkpoints/last.ckpt")
    assert cli.model.audio_head[-1].out_features == 12


def test_the_config_of_a_run_repeats_it(uninterrupted, capsys):
    run = uninterrupted(1, ASK)
    (config,) = (run / "logs").glob("*/config.yaml")
    before = sorted(run.rglob("*"))
    ask_lightning("fit", "--config", config, "--run", "two")
    assert_same_weights(run, Path("two"))
    assert sorted(run.rglob("*")) == before
    # Options that only `fit` has are no obstacle to other commands, and those of a test none to `encode`.
    checkpoint = ("--ckpt_path", run / "checkpoints" / "last.ckpt")
    ask_lightning("test", "--config", config, "--run", "tested", *checkpoint, "--calibrate", "false")
    (of_test,) = Path("tested/logs").glob("*/config.yaml")
    ask_lightning("encode", "--config", of_test, "--run", "tested", *checkpoint, "--output", "a.safetensors")
    message = refusal(capsys, "fit", "--config", config, "--run", run)
    assert message.startswith(f"{run}/checkpoints holds the checkpoints of a run.")
    # A config that names the folder itself is refused wherever `--run` points.
    Path("fixed.yaml").write_text(config.read_text().replace("{run}", str(run)))
    message = refusal(capsys, "fit", "--config", "fixed.yaml", "--run", "three")
    assert message.startswith(f"{run}/checkpoints holds the checkpoints of a run.")


def test_the_seed_of_a_run_is_that_of_its_batches(demo, trained):
    def batches(config: object, *flags: object) -> list[int]:
        given = ("--config", config, *flags, "--run", "again", "--ckpt_path", last_checkpoint(trained))
        return list(ask_lightning("validate", *given).datamodule.train_dataloader().sampler)

    first, other = batches(ASK, demo), batches(ASK, demo, "--seed_everything", 1)
    assert first != other
    assert batches(ASK, demo, "--seed_everything=1") == other
    assert batches(ASK, demo, "--seed_everything", 1, "--data.seed", 0) == first
    # The config of a run holds both, and another seed replaces both.
    (config,) = (trained / "logs").glob("*/config.yaml")
    assert batches(config) == first
    assert batches(config, "--seed_everything", 1) == other
    Path("mine.yaml").write_text(f"compose: [{ASK}]\nseed_everything: 1\n")
    assert batches("mine.yaml", demo) == other
    Path("mine.yaml").write_text(f"compose: [{ASK}]\ndata: {{init_args: {{seed: 1}}}}\n")
    assert batches("mine.yaml", demo, "--seed_everything", 2) == other


@pytest.mark.parametrize("name", [ASK, "clotho_ced_sonar_baseline"])
def test_a_run_that_was_stopped_goes_on(name, demo, uninterrupted):
    # Dropout and SpecAugment go on as well.
    given = ("fit", "--config", name, demo, "--run", "stopped")
    ask_lightning(*given, "--trainer.max_epochs", 1)
    torch.rand(7)
    ask_lightning(*given, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert_same_weights(uninterrupted(2, name), Path("stopped"))


def test_a_run_that_was_killed_goes_on(demo, uninterrupted):
    given = ("fit", "--config", ASK, demo, "--run", "killed", "--trainer.max_epochs")
    with started(Path("printed"), *given, 500) as process:
        wait_for(Path("killed/checkpoints/last.ckpt"), process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = torch.load("killed/checkpoints/last.ckpt", weights_only=True)["epoch"] + 1
    epochs = max(2, done + 1)
    ask_lightning(*given, epochs, "--ckpt_path", "last")
    assert_same_weights(uninterrupted(epochs, ASK), Path("killed"))


@pytest.mark.parametrize(
    ("by", "code", "epochs"), [("SIGINT", 130, 0), ("SIGINT", 130, 1), ("SIGTERM", 143, 1)]
)
def test_a_signal_ends_a_run_that_says_how_to_go_on(by, code, epochs, demo):
    given = ("fit", "--config", ASK, demo, "--run", "run", "--trainer.max_epochs", 500)
    with started(Path("printed"), *given) as process:
        begun = Path("run/checkpoints/last.ckpt") if epochs else Path("run/logs/version_0/config.yaml")
        wait_for(begun, process)
        os.kill(process.pid, getattr(signal, by))
        process.join(60)
    written = Path("printed").read_text()
    assert process.exitcode == code, written
    assert "Traceback" not in written
    assert ("with `--ckpt_path last` goes on" in written) == bool(epochs)


@pytest.mark.slow
def test_commands_run_as_processes(demo, trained):
    given = ["--config", ASK, demo, "--run", "run", "--ckpt_path", str(last_checkpoint(trained))]
    done = subprocess.run(
        [sys.executable, "-m", "ask_lightning", "test", *given],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "test/a2t/recall_at_1" in done.stdout


@pytest.mark.slow
def test_a_run_on_two_ranks(demo):
    """The second process is started by the first with the same command line."""
    options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "2")
    command = [sys.executable, "-m", "ask_lightning", "fit", "--config", ASK, demo, "--run", "run", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation, best epoch (") == 1
    (folder,) = Path("run/logs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert {
        "recall.csv",
        "drift_map.png",
        "queries-epoch-0.csv",
        "queries-epoch-1.csv",
        "query-0.wav",
    } <= names
    assert len(logged(Path("run"))["val/mean_recall"]) == 2


@pytest.mark.slow
def test_a_test_on_two_ranks_leaves_what_one_process_leaves(demo, trained):
    options = ("--config", ASK, demo, "--ckpt_path", str(last_checkpoint(trained)))
    ranks = ("--run", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    command = [sys.executable, "-m", "ask_lightning", "test", *options, *ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ask_lightning("test", *options, "--run", "one")
    left = [sorted(str(path.relative_to(run)) for path in Path(run).rglob("*.*")) for run in ("one", "two")]
    assert left[0] == left[1]
    one, two = (json.loads(Path(run, "results.json").read_text()) for run in ("one", "two"))
    assert two["protocol"] == one["protocol"]
    for kind, expected in one["metrics"].items():
        assert two["metrics"][kind] == pytest.approx(expected)
