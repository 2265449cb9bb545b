"""What each command leaves behind, and that runs which were stopped go on."""

import csv
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.data import ClothoData, PublishedDataModule, WavCaps, leaked_ids
from ask_lightning.models import ResNet38BERT
from tests.helpers.command_line import ASK, BASELINE, ask_lightning, logged, refusal, started, wait_for

# Without randomness of its own a resumed run is the same as one without a break.
PLAIN = ("--model.spec_augment", "false", "--model.dropout", 0)
PLAIN_SONAR = (*PLAIN[:2], "--model.text_config.dropout", 0, "--model.text_config.attention_dropout", 0)


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ask_lightning("fit", "--config", ASK, demo, "--run", run)
    return run


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
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=0, msg=name)


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def test_validate_repeats_what_fit_has_logged(demo, trained):
    cli = ask_lightning("validate", "--config", ASK, demo, "--run", "again", "--ckpt_path", last(trained))
    expected = logged(trained)["val/mean_recall"][-1]
    assert cli.trainer.callback_metrics["val/mean_recall"].item() == pytest.approx(expected)


def test_a_checkpoint_loads_in_its_class_and_tells_its_sizes(demo, tmp_path):
    ask_lightning(
        "fit", "--config", ASK, demo, "--run", "run", "--model.width", 12, "--trainer.max_epochs", 1
    )
    model = ResNet38BERT.load_from_checkpoint("run/checkpoints/last.ckpt")
    assert model.audio_head[-1].out_features == 12
    cli = ask_lightning("test", "--config", BASELINE, demo, "--ckpt_path", "run/checkpoints/last.ckpt")
    assert cli.model.audio_head[-1].out_features == 12


def test_the_config_of_a_run_repeats_it(uninterrupted, capsys):
    run = uninterrupted(3, ASK, *PLAIN)
    (config,) = (run / "logs").glob("*/config.yaml")
    before = sorted(run.rglob("*"))
    ask_lightning("fit", "--config", config, "--run", "two")
    assert_same_weights(run, Path("two"))
    assert sorted(run.rglob("*")) == before
    message = refusal(capsys, "fit", "--config", config, "--run", run)
    assert message.startswith(f"{run}/checkpoints holds the checkpoints of a run.")
    # A config that names the folder itself is refused wherever `--run` points.
    Path("fixed.yaml").write_text(config.read_text().replace("{run}", str(run)))
    message = refusal(capsys, "fit", "--config", "fixed.yaml", "--run", "three")
    assert message.startswith(f"{run}/checkpoints holds the checkpoints of a run.")


@pytest.mark.parametrize("name", [ASK, "clotho_ced_sonar_baseline"])
def test_a_run_that_was_stopped_goes_on(name, demo, uninterrupted):
    options = PLAIN if name == ASK else PLAIN_SONAR
    given = ("fit", "--config", name, demo, "--run", "stopped", *options)
    ask_lightning(*given, "--trainer.max_epochs", 1)
    ask_lightning(*given, "--trainer.max_epochs", 3, "--ckpt_path", "last")
    assert_same_weights(uninterrupted(3, name, *options), Path("stopped"))


def test_a_run_that_was_killed_goes_on(demo, uninterrupted):
    given = ("fit", "--config", ASK, demo, "--run", "killed", *PLAIN, "--trainer.max_epochs")
    with started(Path("printed"), *given, 500) as process:
        wait_for(Path("killed/checkpoints/last.ckpt"), process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = torch.load("killed/checkpoints/last.ckpt", weights_only=True)["epoch"] + 1
    epochs = max(3, done + 1)
    ask_lightning(*given, epochs, "--ckpt_path", "last")
    assert_same_weights(uninterrupted(epochs, ASK, *PLAIN), Path("killed"))


@pytest.mark.parametrize("epochs", [0, 1])
def test_ctrl_c_says_how_to_go_on(epochs, demo):
    given = ("fit", "--config", ASK, demo, "--run", "run", "--trainer.max_epochs", 500)
    with started(Path("printed"), *given) as process:
        begun = Path("run/checkpoints/last.ckpt") if epochs else Path("run/logs/version_0/config.yaml")
        wait_for(begun, process)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    written = Path("printed").read_text()
    assert process.exitcode == 130, written
    assert "Traceback" not in written
    assert ("with `--ckpt_path last` goes on" in written) == bool(epochs)


def test_what_is_encoded_can_be_searched(demo, trained):
    cli = ask_lightning(
        "encode",
        "--config",
        ASK,
        demo,
        "--ckpt_path",
        last(trained),
        "--split",
        "test",
        "--output",
        "a/b.safetensors",
    )
    assert [path.name for path in Path("a").iterdir()] == ["b.safetensors"]
    pairs = EncodedPairs.load(Path("a/b.safetensors"))
    clips = cli.datamodule.datasets["test"].clips
    assert pairs.names == [clip.key for clip in clips]
    assert pairs.captions == [caption for clip in clips for caption in clip.captions]
    assert pairs.clip_of.tolist() == [row for row in range(6) for _ in range(5)]
    torch.testing.assert_close(pairs.audio.norm(dim=1), torch.ones(6))

    for query in (0, 17):
        hits = ask_lightning("search", "a/b.safetensors", "--text", pairs.captions[query], "--top", 3)
        scores = pairs.audio @ pairs.text[query]
        assert [hit.clip for hit in hits] == [pairs.names[row] for row in scores.argsort(descending=True)[:3]]
        assert [hit.score for hit in hits] == pytest.approx(
            scores.sort(descending=True)[0][:3].tolist(), abs=1e-5
        )

    clip = clips[2]
    (file,) = Path(demo.removeprefix("--demo=")).glob(
        f"AudioCaps/audio/test/Y{clip.key.partition(':')[2]}.wav"
    )
    hits = ask_lightning("search", "a/b.safetensors", "--audio", file)
    scores = pairs.text @ pairs.audio[2]
    assert len(hits) == 10
    assert hits[0].caption == pairs.captions[scores.argmax()]
    assert [hit.score for hit in hits] == pytest.approx(
        scores.sort(descending=True)[0][:10].tolist(), abs=1e-4
    )


def test_training_clips_are_encoded_in_order_and_without_random_crops(demo, trained):
    both = []
    for run in ("one", "two"):
        given = ("--config", ASK, demo, "--run", run, "--ckpt_path", last(trained), "--split", "train")
        cli = ask_lightning("encode", *given, "--data.seconds", "0.5", "--data.seed", len(both))
        both.append(EncodedPairs.load(Path(run) / "encoded-train.safetensors"))
        assert both[-1].names == [clip.key for clip in cli.datamodule.datasets["train"].clips]
    assert torch.equal(both[0].audio, both[1].audio)


def test_predict_encodes_the_test_split(demo, trained):
    given = ("--config", ASK, demo, "--run", "run", "--ckpt_path", last(trained))
    ask_lightning("predict", *given)
    ask_lightning("encode", *given)
    predicted = EncodedPairs.load(Path("run/predictions.safetensors"))
    encoded = EncodedPairs.load(Path("run/encoded-test.safetensors"))
    assert torch.equal(predicted.audio, encoded.audio)
    assert torch.equal(predicted.text, encoded.text)


def test_searches_that_cannot_be_answered(demo, trained, capsys):
    ask_lightning("encode", "--config", ASK, demo, "--output", "none.safetensors")
    message = refusal(capsys, "search", "none.safetensors", "--text", "rain")
    assert message == "The file was encoded without a checkpoint. Pass `--ckpt_path`."
    found = ask_lightning("search", "none.safetensors", "--text", "rain", "--ckpt_path", last(trained))
    assert len(found) == 6
    for text, part in (("", "has to hold words"), ("  ", "has to hold words")):
        given = ("search", "none.safetensors", "--text", text, "--ckpt_path", last(trained))
        assert part in refusal(capsys, *given)
    message = refusal(capsys, "search", "none.safetensors", "--text", "rain", "--ckpt_path", "moved.ckpt")
    assert message.startswith("There is no checkpoint 'moved.ckpt', with which the file was encoded.")
    soundfile.write("nothing.wav", np.zeros(0), 32000)
    given = ("search", "none.safetensors", "--audio", "nothing.wav", "--ckpt_path", last(trained))
    assert refusal(capsys, *given).startswith("nothing.wav: the file holds no samples.")
    message = refusal(capsys, "search", "none.safetensors", "--audio", "no.wav", "--ckpt_path", last(trained))
    assert message == "no.wav: the file does not exist. Correct its name or remove its rows."
    content = Path("none.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[: len(content) // 2])
    assert "cut.safetensors is damaged or of another kind" in refusal(
        capsys, "search", "cut.safetensors", "--text", "rain"
    )
    (snapshot, *_) = (trained / "checkpoints").glob("knowledge-*.safetensors")
    message = refusal(capsys, "search", snapshot, "--text", "rain")
    assert "its format is 'ask-lightning knowledge" in message
    ask_lightning(
        "fit", "--config", ASK, demo, "--run", "narrow", "--model.width", 4, "--trainer.max_epochs", 1
    )
    given = ("search", "none.safetensors", "--text", "rain", "--ckpt_path", last(Path("narrow")))
    assert "has embeddings of width 16, but the checkpoint makes 4" in refusal(capsys, *given)


def test_a_file_that_cannot_be_written_is_said_before_the_work(demo, capsys, monkeypatch):
    monkeypatch.setattr("ask_lightning.cli.retrieval_cli.encode_pairs", lambda *_: pytest.fail("encoded"))
    Path("file").touch()
    message = refusal(capsys, "encode", "--config", ASK, demo, "--output", "file/a.safetensors")
    assert message.startswith("file/a.safetensors cannot be written: ")


def test_a_full_disk_leaves_the_file_of_before(demo, trained, capsys, monkeypatch):
    given = ("--config", ASK, demo, "--ckpt_path", last(trained), "--output", "a.safetensors")
    ask_lightning("encode", *given)
    before = Path("a.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ask_lightning.utilities.atomic_files.os.replace", full)
    assert "a.safetensors cannot be written: [Errno 28] No space" in refusal(capsys, "encode", *given)
    assert Path("a.safetensors").read_bytes() == before
    assert [path.name for path in Path().glob("*a.safetensors*")] == ["a.safetensors"]
    assert not list(Path().glob(".*.tmp"))


@pytest.mark.parametrize(
    ("name", "target", "datasets"),
    [
        ("audiocaps_ced_sonar_ask_enriched", "clotho", ["AudioCaps", "Clotho"]),
        ("clotho_resnet38_bert_baseline", "audiocaps", ["Clotho", "AudioCaps"]),
    ],
)
def test_transfer_tests_on_both_datasets(name, target, datasets, demo, capsys):
    rows = ask_lightning("transfer", "--config", name, demo, "--run", "run", "--target", target)
    assert list(rows) == datasets == list(json.loads(Path("run/transfer.json").read_text()))
    with Path("run/transfer.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["dataset"] for row in table] == datasets
    # What `test` says of the same checkpoint on the other dataset.
    other = name.replace("audiocaps", "X").replace("clotho", "audiocaps").replace("X", "clotho")
    cli = ask_lightning("test", "--config", other, demo, "--ckpt_path", "run/checkpoints/best.ckpt")
    expected = 100 * cli.trainer.callback_metrics["test/t2a/map_at_10"].item()
    assert rows[datasets[1]]["t2a/map_at_10"] == pytest.approx(expected, abs=1e-3)
    # The curves of the run hold the dataset of the training alone.
    (found,) = logged(Path("run"))["test/t2a/map_at_10"]
    assert 100 * found == pytest.approx(rows[datasets[0]]["t2a/map_at_10"], abs=1e-3)


def test_transfer_keeps_the_clips_of_the_target_out_of_the_knowledge(demo, monkeypatch):
    sources = []
    made = PublishedDataModule.knowledge_dataset
    monkeypatch.setattr(
        PublishedDataModule, "knowledge_dataset", lambda data: sources.append(made(data)) or sources[-1]
    )
    name = "audiocaps_resnet38_bert_ask_wavcaps"
    given = ("--config", name, demo, "--run", "run", "--trainer.max_epochs", 1, "--target", "clotho")
    ask_lightning("transfer", *given)
    folder = Path(demo.partition("=")[2])
    wavcaps = WavCaps(folder / "WavCaps", check_counts=False)
    target = ClothoData(folder / "Clotho", check_counts=False).evaluation_clips()
    assert leaked_ids(wavcaps, target)
    assert not leaked_ids(sources[0], target)
    assert len(sources[0].clips) == len(wavcaps.clips) - 2


def test_a_config_without_a_dataset_part_cannot_be_transferred(demo, capsys):
    Path("mine.yaml").write_text("trainer: {max_epochs: 1}\n")
    message = refusal(capsys, "transfer", "--config", "mine.yaml", "--target", "clotho")
    assert message.startswith(
        "`transfer` needs a config that is composed of one of the parts audiocaps, clotho"
    )


def test_commands_run_as_processes(demo, trained):
    given = ["--config", ASK, demo, "--run", "run", "--ckpt_path", str(last(trained))]
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
