"""Training on one dataset, tested on two: the table, and a knowledge without the clips of either test."""

import csv
import json
from pathlib import Path

import pytest

from ask_lightning.data import ClothoData, PublishedDataModule, WavCaps, leaked_ids
from tests.helpers.command_line import ask_lightning, logged, refusal


@pytest.mark.parametrize(
    ("name", "target", "datasets"),
    [
        ("audiocaps_ced_sonar_ask_enriched", "clotho", ["AudioCaps", "Clotho"]),
        ("clotho_resnet38_bert_baseline", "audiocaps", ["Clotho", "AudioCaps"]),
    ],
)
def test_transfer_tests_on_both_datasets(name, target, datasets, demo, capsys):
    given = ("--config", name, demo, "--run", "run", "--trainer.max_epochs", 1)
    rows = ask_lightning("transfer", *given, "--target", target)
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
        "`transfer` goes between the datasets audiocaps and clotho, and has to train on one of them, but the "
        "config's parts are none of the shipped ones. Pass one such as `--config clotho_clap_ask`."
    )
    message = refusal(capsys, "transfer", "--config", "my_recordings", "--target", "clotho")
    assert "but the config's parts are " in message
    assert message.endswith("`fit` on the one and `test --ckpt_path best` on the other.")


@pytest.mark.parametrize(
    ("flags", "refused", "remedy"),
    [
        (["--model.sample_rate", 16000, "--data.sample_rate", 16000], "32000", "--target.sample_rate 16000"),
        (["--data.caption_style=raw"], "'plain'", "--target.caption_style raw"),
        (["--target.sample_rate", 8000], "8000", "--target.sample_rate 32000"),
    ],
)
def test_a_target_that_would_be_read_otherwise_is_refused(flags, refused, remedy, demo, capsys):
    given = ("--config", "audiocaps_resnet38_bert_baseline", demo, "--run", "run", "--target", "clotho")
    message = refusal(capsys, "transfer", *given, *flags)
    assert message.startswith("The model is trained with ")
    assert message.endswith(f"but the target has {refused}. Pass `{remedy}`.")
    assert not Path("run").exists()
