"""What tables, pictures and sounds of a run have in common: files, loggers, and no trace in the training."""

import json
from pathlib import Path

import pytest
import torch
from lightning_utilities.core.imports import RequirementCache

from ask_lightning.callbacks import DriftMap
from tests.helpers.command_line import ASK, BASELINE, ask_lightning, csv_rows, log_folder, refusal

wandb = pytest.importorskip("wandb")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def last_weights(run: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_training_is_what_it_was_without_tracking(demo, trained):
    """Dropout and SpecAugment draw from the global streams, so that any other draw would be seen."""
    Path("plain.yaml").write_text(
        f"compose: [{ASK}]\nask: {{monitors: false}}\n"
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: '{run}/checkpoints', "
        "filename: last}}]}\n"
    )
    ask_lightning("fit", "--config", "plain.yaml", demo, "--run", "plain")
    tracked = last_weights(trained)
    for name, value in last_weights("plain").items():
        assert torch.equal(tracked[name], value), name
    assert not list(log_folder("plain").glob("*.png"))


def test_files_of_a_run(trained):
    names = {path.name for path in log_folder(trained).iterdir()}
    assert {"recall.csv", "drift_map.csv", "drift_map.png", "queries-epoch-0.csv", "query-0.wav"} <= names


def test_without_a_logger_files_go_to_the_folder_of_the_run(demo):
    ask_lightning("fit", "--config", BASELINE, demo, "--run", "run", "--trainer.logger", "false")
    names = {path.name for path in Path("run").iterdir()}
    assert {"recall.csv", "drift_map.csv", "drift_map.png", "config.yaml", "checkpoints"} <= names
    assert not {name for name in names if name.startswith("quer")}, "a baseline has no knowledge to ask"


@pytest.fixture
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


@pytest.mark.usefixtures("_offline")
def test_wandb_offline(demo):
    ask_lightning("fit", "--config", ASK, "--config", "wandb", demo, "--run", "run")
    wandb.finish()
    (media,) = Path("run/wandb").glob("offline-run-*/files/media")
    assert list(media.glob("images/drift_map_*.png"))
    (table,) = media.glob("table/queries-epoch-1_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:2] == ["query", "direction"]
    assert content["columns"][-1] == "audio"
    sounds = list(media.glob("audio/query_*.wav"))
    assert len(sounds) == 6
    assert all(sound.read_bytes()[:4] == b"RIFF" for sound in sounds)
    assert list(media.glob("table/recall_*.table.json"))
    (log,) = Path("run/wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    for curve in (b"ask/factor_t2a", b"ask/rdm_audio", b"val/mean_recall"):
        assert curve in written


def test_tensorboard(demo):
    ask_lightning("fit", "--config", ASK, "--config", "tensorboard", demo, "--run", "run")
    (folder,) = Path("run/tensorboard").iterdir()
    size_guidance = {"images": 0, "audio": 0, "tensors": 0}
    events = event_accumulator.EventAccumulator(str(folder), size_guidance=size_guidance)
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["drift_map"]
    assert {"query-0", "query-5"} <= set(tags["audio"])
    assert {"recall/text_summary", "queries-epoch-0/text_summary"} <= set(tags["tensors"])
    assert {"ask/factor_t2a", "val/mean_recall", "train/loss_step"} <= set(tags["scalars"])
    assert (log_folder("run") / "drift_map.png").exists(), "files lie with those of the first logger"


def test_a_logger_that_is_not_installed(demo, capsys, monkeypatch):
    missing = RequirementCache("wandb>=99")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    message = refusal(capsys, "fit", "--config", ASK, "--config", "wandb", demo)
    assert message.startswith(
        "lightning.pytorch.loggers.wandb.WandbLogger needs a package that is missing: Requirement"
    )
    assert message.endswith('Install what loggers need: pip install "ask-lightning[track]".')


def test_a_file_that_cannot_be_written_does_not_end_the_run(demo):
    (log_folder("run") / "recall.csv").mkdir(parents=True)
    (log_folder("run", 1) / "recall.csv").mkdir(parents=True)
    given = ["--config", BASELINE, demo, "--run", "run", "--trainer.logger", "false"]
    given += ["--trainer.default_root_dir", log_folder("run"), "--trainer.max_epochs", 1]
    with pytest.warns(UserWarning, match=r"recall.csv could not be written .*Training goes on without it"):
        cli = ask_lightning("fit", *given)
    assert cli.trainer.state.finished


def test_a_resumed_run_goes_on_with_its_map_and_its_best_epoch(demo):
    given = ("fit", "--config", ASK, demo, "--run", "run", "--trainer.max_epochs")
    ask_lightning(*given, 2)
    (first, _) = csv_rows(log_folder("run") / "recall.csv")
    cli = ask_lightning(*given, 3, "--ckpt_path", "last")
    epochs = {row["epoch"] for row in csv_rows(log_folder("run", 1) / "drift_map.csv")}
    assert epochs == {"0", "1", "2"}
    best = csv_rows(log_folder("run", 1) / "recall.csv")[0]
    mean = lambda row: sum(float(row[f"{way} R@{k}"]) for way in ("A2T", "T2A") for k in (1, 5, 10))  # noqa: E731
    assert mean(best) >= mean(first)
    (drift_map,) = [one for one in cli.trainer.callbacks if isinstance(one, DriftMap)]
    assert list(drift_map._embeddings) == [0, 1, 2]
