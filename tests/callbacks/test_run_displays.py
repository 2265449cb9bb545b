"""Tables, pictures and sounds of a run: in files and in loggers, and without a trace in the training."""

import csv
import json
import sys
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning_utilities.core.imports import RequirementCache
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ask_lightning import KnowledgeRefreshCallback
from ask_lightning.callbacks import DriftMap, QueryTable
from ask_lightning.callbacks.drift_map import project
from tests.helpers.command_line import ASK, BASELINE, ask_lightning, refusal

FEW = ("--trainer.max_epochs", 1)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def logs(run: str, version: int = 0) -> Path:
    return Path(run) / "logs" / f"version_{version}"


def last_weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_training_is_what_it_was_without_tracking(demo):
    """Dropout and SpecAugment draw from the global streams, so that any other draw would be seen."""
    ask_lightning("fit", "--config", ASK, demo, "--run", "tracked")
    Path("plain.yaml").write_text(
        "compose: [audiocaps_resnet38_bert_ask]\nask: {monitors: false}\n"
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: '{run}/checkpoints', "
        "filename: last}}]}\n"
    )
    ask_lightning("fit", "--config", "plain.yaml", demo, "--run", "plain")
    for name, value in last_weights("plain").items():
        assert torch.equal(last_weights("tracked")[name], value), name
    assert not list(logs("plain").glob("*.png"))


def test_files(demo):
    ask_lightning("fit", "--config", ASK, demo, "--run", "run")
    ask_lightning("test", "--config", ASK, demo, "--run", "run", "--ckpt_path", "best")
    names = {path.name for path in logs("run").iterdir()}
    assert {
        "recall.csv",
        "drift_map.csv",
        "drift_map.png",
        "queries-epoch-0.csv",
        "queries-epoch-1.csv",
    } <= names
    assert {f"query-{number}.wav" for number in range(6)} <= names
    best, last = rows_of(logs("run") / "recall.csv")
    assert best["% of"].startswith("validation, best epoch (")
    assert last["% of"] == "validation, last epoch (1)"
    (tested,) = rows_of(logs("run", 1) / "recall.csv")
    assert tested["% of"] == "test"
    assert 0 <= float(tested["T2A R@10"]) <= 100
    assert len(rows_of(logs("run") / "drift_map.csv")) == 2 * 2 * 30  # epochs, modalities, captions


def test_without_a_logger_files_go_to_the_folder_of_the_run(demo):
    ask_lightning("fit", "--config", BASELINE, demo, "--run", "run", "--trainer.logger", "false")
    names = {path.name for path in Path("run").iterdir()}
    assert {"recall.csv", "drift_map.csv", "drift_map.png", "config.yaml", "checkpoints"} <= names
    assert not {name for name in names if name.startswith("quer")}, "a baseline has no knowledge to ask"


def test_a_table_of_queries_holds_what_the_loss_computes(demo):
    cli = ask_lightning("fit", "--config", ASK, demo, "--run", "run", "--data.num_workers", 0, *FEW)
    table = rows_of(logs("run") / "queries-epoch-0.csv")
    data, model, loss = cli.datamodule, cli.model.model.eval(), cli.model.loss
    items = torch.linspace(0, 29, 6).long().tolist()
    pairs = [data.datasets["val"][row] for row in items]
    batch = {
        "waveform": torch.stack([pair["waveform"] for pair in pairs]),
        "num_samples": torch.tensor([pair["num_samples"] for pair in pairs]),
        "caption": [pair["caption"] for pair in pairs],
    }
    with torch.no_grad():
        audio, text = model.encode_audio(batch), model.encode_text(batch)
        near = loss.retrieve(audio, text, loss.knowledge)
        _, terms = loss.from_neighborhoods(audio, text, near)
    source = data.knowledge_dataset()
    for number, row in enumerate(table):
        query, direction = number // 2, ("t2a", "a2t")[number % 2]
        assert row["query"] == batch["caption"][query]
        assert row["direction"] == direction.upper()
        psi = {name: terms[f"psi_{name}_{direction}"][query].item() for name in ("fine", "coarse")}
        for name, value in psi.items():
            assert float(row[f"psi_{name}"]) == pytest.approx(value, abs=2e-4)
        factor = 1 - 0.2 * np.log(psi["fine"]) - 0.3 * np.log(psi["coarse"])
        assert float(row["factor"]) == pytest.approx(factor, abs=2e-4)
        nearest = (loss.knowledge.fine.text @ text[query]).argsort(descending=True)[:3].tolist()
        assert row["retrieved by text"] == " · ".join(source[found]["caption"] for found in nearest)
        assert 1 / np.e <= float(row["psi_fine of noise"]) <= np.e


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
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "audio": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["drift_map"]
    assert {"query-0", "query-5"} <= set(tags["audio"])
    assert {"recall/text_summary", "queries-epoch-0/text_summary"} <= set(tags["tensors"])
    assert {"ask/factor_t2a", "val/mean_recall", "train/loss_step"} <= set(tags["scalars"])
    assert (logs("run") / "drift_map.png").exists(), "files lie with those of the first logger"


def test_a_logger_that_is_not_installed(demo, capsys, monkeypatch):
    missing = RequirementCache("wandb>=99")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    message = refusal(capsys, "fit", "--config", ASK, "--config", "wandb", demo)
    assert message.startswith(
        "lightning.pytorch.loggers.wandb.WandbLogger needs a package that is missing: Requirement"
    )
    assert message.endswith('Install what loggers need: pip install "ask-lightning[track]".')


def test_without_matplotlib_there_is_the_table(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"writes its table only; pictures need: pip install"):
        ask_lightning("fit", "--config", BASELINE, demo, "--run", "run")
    assert (logs("run") / "drift_map.csv").exists()
    assert not (logs("run") / "drift_map.png").exists()


def test_a_file_that_cannot_be_written_does_not_end_the_run(demo):
    (logs("run") / "recall.csv").mkdir(parents=True)
    (logs("run", 1) / "recall.csv").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"recall.csv could not be written .*Training goes on without it"):
        cli = ask_lightning("fit", "--config", BASELINE, demo, "--run", "run", "--trainer.logger", "false",
                            "--trainer.default_root_dir", logs("run"), *FEW)  # fmt: skip
    assert cli.trainer.state.finished


def test_a_resumed_run_goes_on_with_its_map_and_its_best_epoch(demo):
    given = ("fit", "--config", ASK, demo, "--run", "run", "--trainer.max_epochs")
    ask_lightning(*given, 2)
    (first, _) = rows_of(logs("run") / "recall.csv")
    cli = ask_lightning(*given, 3, "--ckpt_path", "last")
    epochs = {row["epoch"] for row in rows_of(logs("run", 1) / "drift_map.csv")}
    assert epochs == {"0", "1", "2"}
    best = rows_of(logs("run", 1) / "recall.csv")[0]
    mean = lambda row: sum(float(row[f"{way} R@{k}"]) for way in ("A2T", "T2A") for k in (1, 5, 10))  # noqa: E731
    assert mean(best) >= mean(first)
    (drift_map,) = [one for one in cli.trainer.callbacks if isinstance(one, DriftMap)]
    assert list(drift_map._embeddings) == [0, 1, 2]


def test_what_is_missing_is_said(demo, capsys):
    with pytest.warns(UserWarning, match="there are no validation data with an index"):
        ask_lightning("fit", "--config", ASK, demo, "--run", "run", "--trainer.limit_val_batches", 0, *FEW)
    trainer = L.Trainer(logger=False)
    with pytest.raises(
        RuntimeError, match="QueryTable needs the knowledge of a KnowledgeRefreshCallback, but"
    ):
        QueryTable().setup(trainer, L.LightningModule(), "fit")
    trainer.callbacks.append(KnowledgeRefreshCallback())
    with pytest.raises(ValueError, match="Argument `audio` of QueryTable has to name a method of Lightning"):
        QueryTable(audio="listen").setup(trainer, L.LightningModule(), "fit")
    Path("mine.yaml").write_text(
        f"compose: [{BASELINE}]\ntrainer: {{callbacks+: [{{class_path: ask_lightning.callbacks.DriftMap, "
        "init_args: {audio: listen}}]}\n"
    )
    message = refusal(capsys, "fit", "--config", "mine.yaml", demo)
    assert message.startswith("Argument `audio` of DriftMap has to name a method of ")


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DriftMap, {"every_n_epochs": 0}), (DriftMap, {"num_clips": 1}), (QueryTable, {"num_shown": 0})],
)
def test_arguments_out_of_range(kind, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Argument `{name}` has to be an integer of at least"):
        kind(**options)


def test_the_map_keeps_as_much_of_the_distances_as_a_plane_can():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))
    places = project(flat @ turned[:2] + 3)
    torch.testing.assert_close(
        torch.cdist(places.double(), places.double()), torch.cdist(flat, flat), atol=1e-4, rtol=0
    )
    rows = torch.randn(30, 6, generator=generator)
    centred = (rows - rows.mean(0)).numpy()
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(project(rows).norm(dim=0).numpy(), singular[:2], rtol=1e-4)
    torch.testing.assert_close(project(rows), project(rows.clone()))
    assert project(torch.randn(5, 1)).shape == (5, 2)


def test_importing_tracking_needs_neither_wandb_nor_matplotlib():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DriftMap().every_n_epochs == 10
