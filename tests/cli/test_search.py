"""Searching an encoded split: hits, how they are printed, and searches that cannot be answered."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.cli import run as run_command
from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.search import find_hits
from ask_lightning.data import collate_pairs
from ask_lightning.functional import unit_length
from ask_lightning.models import ResNet38BERT
from tests.helpers.command_line import ASK, ask_lightning, last_checkpoint, refusal


def test_what_is_encoded_can_be_searched(demo, trained):
    cli = ask_lightning(
        "encode",
        "--config",
        ASK,
        demo,
        "--ckpt_path",
        last_checkpoint(trained),
        "--split",
        "test",
        "--output",
        "a/b.safetensors",
    )
    assert [path.name for path in Path("a").iterdir()] == ["b.safetensors"]
    pairs = EncodedPairs.load(Path("a/b.safetensors"))
    clips = cli.datamodule.datasets["test"].clips
    assert pairs.names == [clip.key for clip in clips]
    assert pairs.sample_rate == 32000
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


def test_hits_are_printed_as_a_table(demo, trained, capsys):
    ask_lightning(
        "encode", "--config", ASK, demo, "--ckpt_path", last_checkpoint(trained), "--output", "a.safetensors"
    )
    capsys.readouterr()
    hits = run_command(["search", "a.safetensors", "--text", "rain", "--top", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if "rank" in line] == [["rank", "score", "clip", "caption"]]
    for rank, hit in enumerate(hits, start=1):
        (row,) = [line for line in printed if line.split()[:1] == [str(rank)]]
        assert f"{hit.score:.3f}" in row
        assert hit.clip in row
        assert row.rstrip().endswith(hit.caption)
    for flags in (["--lowest", "1.5"], ["--contains", "nothing has this"]):
        assert run_command(["search", "a.safetensors", "--text", "rain", *flags]) == []
        said = "Nothing was found: lower `--lowest`, or give another `--contains`."
        assert capsys.readouterr().out.strip() == said


def test_searches_that_cannot_be_answered(demo, trained, capsys):
    checkpoint = ("--ckpt_path", last_checkpoint(trained))
    ask_lightning("encode", "--config", ASK, demo, "--output", "untrained.safetensors")
    message = refusal(capsys, "search", "untrained.safetensors", "--text", "rain")
    assert message.startswith(
        "The file was encoded without a checkpoint, by other weights than the model has"
    )
    message = refusal(capsys, "search", "untrained.safetensors", "--text", "rain", *checkpoint)
    assert message.startswith(f"{last_checkpoint(trained)} holds other weights than those that encoded")
    ask_lightning("encode", "--config", ASK, demo, "--output", "none.safetensors", *checkpoint)
    for text, part in (("", "has to hold words"), ("  ", "has to hold words")):
        given = ("search", "none.safetensors", "--text", text, *checkpoint)
        assert part in refusal(capsys, *given)
    message = refusal(capsys, "search", "none.safetensors", "--text", "rain", "--ckpt_path", "moved.ckpt")
    assert message.startswith("There is no checkpoint 'moved.ckpt', with which the file was encoded.")
    soundfile.write("nothing.wav", np.zeros(0), 32000)
    given = ("search", "none.safetensors", "--audio", "nothing.wav", *checkpoint)
    assert refusal(capsys, *given).startswith("nothing.wav: the file holds no samples.")
    message = refusal(capsys, "search", "none.safetensors", "--audio", "no.wav", *checkpoint)
    assert message == "There is no audio file no.wav."
    message = refusal(capsys, "search", "none.safetensors", "--audio", "Nothing.WAV", *checkpoint)
    assert message == "There is no audio file Nothing.WAV. There is nothing.wav."
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
    given = ("search", "none.safetensors", "--text", "rain", "--ckpt_path", last_checkpoint(Path("narrow")))
    assert "holds other weights than those that encoded the file" in refusal(capsys, *given)
    torch.save({"hyper_parameters": {"num_mels": 64}, "state_dict": {}}, "tiny.ckpt")
    message = refusal(capsys, *given[:-1], "tiny.ckpt")
    assert message.startswith("tiny.ckpt is no checkpoint of ask_lightning.models.")
    assert "ResNet38BERT, which encoded the file. Pass the checkpoint that it was enc" in message
    message = refusal(capsys, "search", "none.safetensors", "--audio", ".", *checkpoint)
    assert message == ".: a folder, not an audio file. Name a file in it."
    soundfile.write("loud.wav", np.full(3200, 1e30), 32000, subtype="FLOAT")
    message = refusal(capsys, "search", "none.safetensors", "--audio", "loud.wav", *checkpoint)
    assert message.startswith("loud.wav: the file holds samples of 1e+30")


def test_a_later_fit_into_the_same_folder_is_noticed(demo, trained, capsys):
    """The path is the same, the weights are not."""
    shutil.copy(last_checkpoint(trained), "best.ckpt")
    given = ("--config", ASK, demo, "--ckpt_path", "best.ckpt")
    ask_lightning("encode", *given, "--output", "a.safetensors")
    assert len(ask_lightning("search", "a.safetensors", "--text", "rain")) == 6
    shutil.copy("best.ckpt", "kept.ckpt")
    checkpoint = torch.load("best.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1e-3
    torch.save(checkpoint, "best.ckpt")
    message = refusal(capsys, "search", "a.safetensors", "--text", "rain")
    assert "best.ckpt holds other weights than those that encoded the file" in message
    assert "Encode the split anew, or pass as `--ckpt_path` " in message
    given = ("search", "a.safetensors", "--text", "rain", "--ckpt_path", "kept.ckpt")
    assert len(ask_lightning(*given)) == 6


def test_a_query_that_the_model_makes_nan_of(demo, trained, capsys, monkeypatch):
    checkpoint = ("--ckpt_path", last_checkpoint(trained))
    ask_lightning("encode", "--config", ASK, demo, "--output", "a.safetensors", *checkpoint)
    monkeypatch.setattr(ResNet38BERT, "encode_text", lambda *_: torch.full((1, 16), torch.nan))
    message = refusal(capsys, "search", "a.safetensors", "--text", "rain")
    assert message.startswith("The model makes NaN or infinity of the query")


def test_training_clips_of_a_folder_are_encoded_without_random_crops():
    random = np.random.default_rng(0)
    for number in range(8):
        soundfile.write(f"{number}.wav", random.uniform(-0.5, 0.5, 16000), 16000)
    rows = ["filename,caption", *(f"{number}.wav,noise number {number}" for number in range(8))]
    Path("clips.csv").write_text("\n".join(rows))
    Path("mine.yaml").write_text(
        "compose: [run, ask]\n"
        "model: {class_path: TinyRetriever}\n"
        "data: {class_path: FolderData, init_args: {root: ., annotations: clips.csv, fractions: [0.5, 0.5], "
        "seconds: 0.2, batch_size: 4}}\n"
        "trainer: {accelerator: cpu}\n"
    )
    given = ("--config", "mine.yaml", "--split", "train", "--output", "a.safetensors")
    cli = ask_lightning("encode", *given)
    middle = collate_pairs(list(cli.datamodule.datasets["train"].without_random_crops()))
    expected = unit_length(cli.model.eval().encode_audio(middle)).detach()
    torch.testing.assert_close(EncodedPairs.load(Path("a.safetensors")).audio, expected, rtol=1e-4, atol=1e-5)
    knowledge = cli.datamodule.knowledge_dataset()
    assert torch.equal(collate_pairs(list(knowledge))["waveform"], middle["waveform"])


def test_queries_are_written_like_the_captions(demo, trained):
    """Those of the paper's rows are in lower case without punctuation."""
    given = ("--config", ASK, demo, "--ckpt_path", last_checkpoint(trained), "--output", "a.safetensors")
    ask_lightning("encode", *given)
    pairs = EncodedPairs.load(Path("a.safetensors"))
    assert pairs.caption_style == "plain"
    hits = ask_lightning("search", "a.safetensors", "--text", f"{pairs.captions[3].upper()}!")
    assert hits == ask_lightning("search", "a.safetensors", "--text", pairs.captions[3])
    with pytest.raises(UsageError, match=r"`--text` has to hold words, but got '\?!'"):
        ask_lightning("search", "a.safetensors", "--text", "?!")
    ask_lightning("encode", *given, "--data.caption_style", "raw")
    assert EncodedPairs.load(Path("a.safetensors")).caption_style == "raw"


class Listener(pl.LightningModule):
    """A model that knows nothing of sample rates: the embedding is the length of the waveform."""

    def encode_audio(self, batch):
        return torch.tensor([[1.0, float(batch["waveform"].shape[1])]])

    def encode_text(self, batch):
        return torch.ones(len(batch["caption"]), 2)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_audio_is_heard_at_the_rate_of_the_encoded_data(rate):
    soundfile.write("a.wav", np.zeros(24000), 24000)
    sides = (torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, float(rate)]]))
    pairs = EncodedPairs(
        *sides, torch.zeros(1).long(), torch.zeros(1).long(), ["a"], ["rain"], sample_rate=rate
    )
    (hit,) = find_hits(Listener(), pairs, Path("a.wav"), top=1)
    assert hit.cosine == pytest.approx(unit_length(sides[1])[0] @ sides[1][0])
    pairs.sample_rate = None
    with pytest.raises(UsageError, match="Neither the encoded data nor Listener says at which rate audio is"):
        find_hits(Listener(), pairs, Path("a.wav"), top=1)
