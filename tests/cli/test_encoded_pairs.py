"""Embeddings of a split on disk: what is in the file, and files that cannot be written."""

from pathlib import Path

import pytest
import torch

from ask_lightning.cli.encoded_pairs import EncodedPairs
from tests.helpers.command_line import ASK, ask_lightning, last_checkpoint, refusal


def test_training_clips_are_encoded_in_order_and_without_random_crops(demo, trained):
    both = []
    for run in ("one", "two"):
        given = (
            "--config",
            ASK,
            demo,
            "--run",
            run,
            "--ckpt_path",
            last_checkpoint(trained),
            "--split",
            "train",
        )
        cli = ask_lightning("encode", *given, "--data.seconds", "0.5", "--data.seed", len(both))
        both.append(EncodedPairs.load(Path(run) / "encoded-train.safetensors"))
        assert both[-1].names == [clip.key for clip in cli.datamodule.datasets["train"].clips]
    assert torch.equal(both[0].audio, both[1].audio)


def test_predict_encodes_the_test_split(demo, trained):
    given = ("--config", ASK, demo, "--run", "run", "--ckpt_path", last_checkpoint(trained))
    ask_lightning("predict", *given)
    ask_lightning("encode", *given)
    predicted = EncodedPairs.load(Path("run/predictions.safetensors"))
    encoded = EncodedPairs.load(Path("run/encoded-test.safetensors"))
    assert torch.equal(predicted.audio, encoded.audio)
    assert torch.equal(predicted.text, encoded.text)


def test_a_file_that_cannot_be_written_is_said_before_the_work(demo, capsys, monkeypatch):
    monkeypatch.setattr("ask_lightning.cli.retrieval_cli.encode_pairs", lambda *_: pytest.fail("encoded"))
    Path("file").touch()
    message = refusal(capsys, "encode", "--config", ASK, demo, "--output", "file/a.safetensors")
    assert message.startswith("file/a.safetensors cannot be written: ")


def test_a_full_disk_leaves_the_file_of_before(demo, trained, capsys, monkeypatch):
    given = ("--config", ASK, demo, "--ckpt_path", last_checkpoint(trained), "--output", "a.safetensors")
    ask_lightning("encode", *given)
    before = Path("a.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ask_lightning.utilities.atomic_files.os.replace", full)
    assert "a.safetensors cannot be written: [Errno 28] No space" in refusal(capsys, "encode", *given)
    assert Path("a.safetensors").read_bytes() == before
    assert [path.name for path in Path().glob("*a.safetensors*")] == ["a.safetensors"]
    assert not list(Path().glob(".*.tmp"))
