"""Searching an encoded split: hits, how they are printed, and searches that cannot be answered."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.cli import run as run_command
from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.errors import UsageError
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


def test_searches_that_cannot_be_answered(demo, trained, capsys):
    ask_lightning("encode", "--config", ASK, demo, "--output", "none.safetensors")
    checkpoint = ("--ckpt_path", last_checkpoint(trained))
    message = refusal(capsys, "search", "none.safetensors", "--text", "rain")
    assert message == "The file was encoded without a checkpoint. Pass `--ckpt_path`."
    found = ask_lightning(
        "search", "none.safetensors", "--text", "rain", "--ckpt_path", last_checkpoint(trained)
    )
    assert len(found) == 6
    for text, part in (("", "has to hold words"), ("  ", "has to hold words")):
        given = ("search", "none.safetensors", "--text", text, *checkpoint)
        assert part in refusal(capsys, *given)
    message = refusal(capsys, "search", "none.safetensors", "--text", "rain", "--ckpt_path", "moved.ckpt")
    assert message.startswith("There is no checkpoint 'moved.ckpt', with which the file was encoded.")
    soundfile.write("nothing.wav", np.zeros(0), 32000)
    given = ("search", "none.safetensors", "--audio", "nothing.wav", *checkpoint)
    assert refusal(capsys, *given).startswith("nothing.wav: the file holds no samples.")
    message = refusal(
        capsys, "search", "none.safetensors", "--audio", "no.wav", "--ckpt_path", last_checkpoint(trained)
    )
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
    given = ("search", "none.safetensors", "--text", "rain", "--ckpt_path", last_checkpoint(Path("narrow")))
    assert "has embeddings of width 16, but the checkpoint makes 4" in refusal(capsys, *given)


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
