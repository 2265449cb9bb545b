"""Embeddings of a split on disk: what is in the file, and files that cannot be written."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError
from ask_lightning.data import collate_pairs
from ask_lightning.metrics.grid import unit_clips
from ask_lightning.models import ResNet38BERT
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


def test_takes_of_a_recording_are_one_clip_as_in_the_metrics():
    random = np.random.default_rng(0)
    rows = ["filename,caption,session"]
    for number in range(12):
        soundfile.write(f"{number}.wav", random.uniform(-0.5, 0.5, 3200), 16000)
        rows.append(f"{number}.wav,noise number {number},session {number // 3}")
    Path("clips.csv").write_text("\n".join(rows))
    Path("mine.yaml").write_text(
        "compose: [run]\n"
        "model: {class_path: TinyRetriever}\n"
        "data: {class_path: FolderData, init_args: {root: ., annotations: clips.csv, fractions: [0.5, 0.5], "
        "clip_id_column: session, seconds: 0.2, batch_size: 4}}\n"
        "trainer: {accelerator: cpu}\n"
    )
    cli = ask_lightning("encode", "--config", "mine.yaml", "--split", "val", "--output", "a.safetensors")
    pairs = EncodedPairs.load(Path("a.safetensors"))
    takes = collate_pairs(list(cli.datamodule.datasets["val"]))
    audio = cli.model.eval().encode_audio(takes).detach()
    expected, clip_of = unit_clips(audio, takes["clip_id"])
    assert len(pairs.names) == 2
    assert set(pairs.names) <= {f"session {number}" for number in range(4)}
    torch.testing.assert_close(pairs.audio[pairs.clip_of], expected[clip_of].float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(pairs.clip_ids[pairs.clip_of], takes["clip_id"])


def test_predict_encodes_the_test_split(demo, trained):
    given = ("--config", ASK, demo, "--run", "run", "--ckpt_path", last_checkpoint(trained))
    ask_lightning("predict", *given)
    ask_lightning("encode", *given)
    predicted = EncodedPairs.load(Path("run/predictions.safetensors"))
    encoded = EncodedPairs.load(Path("run/encoded-test.safetensors"))
    assert torch.equal(predicted.audio, encoded.audio)
    assert torch.equal(predicted.text, encoded.text)


def test_embeddings_that_are_no_numbers_are_not_written(demo, trained, capsys, monkeypatch):
    given = ("--config", ASK, demo, "--ckpt_path", last_checkpoint(trained), "--output", "a.safetensors")
    monkeypatch.setattr(ResNet38BERT, "encode_text", lambda _, batch: torch.ones(len(batch["caption"]), 16))
    monkeypatch.setattr(
        ResNet38BERT, "encode_audio", lambda _, batch: torch.full((len(batch["caption"]), 16), torch.nan)
    )
    message = refusal(capsys, "encode", *given)
    assert re.match(r"The model makes NaN or infinity of (\d+) of the \1 pairs of a batch, which", message)
    assert not list(Path().glob("a.safetensors*"))


def test_a_file_that_cannot_be_written_is_said_before_the_work(demo, capsys, monkeypatch):
    monkeypatch.setattr("ask_lightning.cli.trainer.encode_split", lambda *_: pytest.fail("encoded"))
    Path("file").touch()
    message = refusal(capsys, "encode", "--config", ASK, demo, "--output", "file/a.safetensors")
    assert message.startswith("file/a.safetensors cannot be written: ")


@pytest.mark.parametrize(
    ("path", "num_parts"), [("a.safetensors", 2), ("a.safetensors.parts/test/part-00000001.safetensors", 1)]
)
def test_a_full_disk_leaves_the_file_of_before_and_the_parts(
    path, num_parts, demo, trained, capsys, monkeypatch
):
    given = ("--config", ASK, demo, "--ckpt_path", last_checkpoint(trained), "--output", "a.safetensors")
    given += ("--data.batch_size", 15)
    ask_lightning("encode", *given)
    before = Path("a.safetensors").read_bytes()
    replace = os.replace

    def full(source, target):
        if str(target) == path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("ask_lightning.utilities.atomic_files.os.replace", full)
    assert refusal(capsys, "encode", *given).startswith(f"{path} cannot be written: [Errno 28] No space")
    assert Path("a.safetensors").read_bytes() == before
    left = sorted(path.name for path in Path().rglob("*") if path.suffix in (".safetensors", ".tmp"))
    assert left == ["a.safetensors", *(f"part-0000000{number}.safetensors" for number in range(num_parts))]


@pytest.mark.parametrize("side", ["audio", "text"])
def test_a_byte_that_changed_in_the_embeddings_is_noticed(side):
    rows = {"audio": torch.randn(5, 64), "text": torch.randn(5, 64)}
    path = Path("a.safetensors")
    names = [str(number) for number in range(5)]
    EncodedPairs(**rows, clip_ids=torch.arange(5), clip_of=torch.arange(5), names=names, captions=names).save(
        path
    )
    assert torch.equal(EncodedPairs.load(path).audio, rows["audio"])
    content = bytearray(path.read_bytes())
    content[content.index(rows[side].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"damaged: its {side} embeddings are not those that were written"):
        EncodedPairs.load(path)


@pytest.mark.parametrize(
    ("lacking", "told"),
    [("names_ends", "is damaged"), ("sample_rate", "is damaged"), ("clip_of", "holds other parts than")],
)
def test_a_file_that_lacks_a_part_is_said_to_be_of_another_kind(lacking, told):
    audio, text = torch.randn(3, 4), torch.randn(3, 4)
    path = Path("a.safetensors")
    names = ["a", "b", "c"]
    EncodedPairs(audio, text, torch.arange(3), torch.arange(3), names=names, captions=names).save(path)
    with safe_open(path, framework="pt") as stored:
        metadata = {key: value for key, value in stored.metadata().items() if key != lacking}
        tensors = {name: stored.get_tensor(name) for name in stored.keys() if name != lacking}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UsageError, match=f"^a.safetensors {told} .*{lacking}.*`ask-lightning encode`"):
        EncodedPairs.load(path)
