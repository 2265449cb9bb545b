"""Encoding by several processes, and going on after one that was killed: the file is that of one process."""

import os
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import ConcatDataset, Subset

from ask_lightning.cli import run
from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.encoded_parts import EncodedParts, batches_of_parts
from ask_lightning.cli.search import _hear, load_model
from ask_lightning.data import AudioFolder, RetrievalDataModule
from ask_lightning.models import TinyRetriever, save_pretrained
from tests.helpers.command_line import ask_lightning, refusal, started
from tests.helpers.encoded_files import save_checkpoint
from tests.helpers.ranks import on_ranks

NUM_BATCHES = 8


class Stopping(TinyRetriever):
    """Counts the batches that it encodes, and stops before the last ones if it is told to."""

    count = 0

    def encode_audio(self, batch):
        if Stopping.count >= int(os.environ.get("STOP_AFTER", "99")):
            if (by := os.environ["STOP_BY"]) == "error":
                raise OSError("no file any more")
            os.kill(os.getpid(), getattr(signal, by))
        Stopping.count += 1
        return super().encode_audio(batch)


class Joined(RetrievalDataModule):
    """A test split of two datasets in a row."""

    def build(self):
        clips = AudioFolder(".", "clips.csv", sample_rate=16000, seconds=2, caption_style="plain")
        return {"test": ConcatDataset([Subset(clips, range(2)), Subset(clips, range(6, 9))])}


@pytest.fixture(autouse=True)
def recordings():
    """Five clips of different lengths with three captions each, which batches of two pairs divide."""
    Stopping.count = 0
    random = np.random.default_rng(0)
    rows = ["filename,caption"]
    for number in range(5):
        soundfile.write(f"{number}.wav", random.uniform(-1, 1, 4000 + 1500 * number), 16000)
        rows += [f"{number}.wav,{text} {number}" for text in ("noise", "a long hiss again", "wind")]
    Path("clips.csv").write_text("\n".join(rows))
    Path("mine.yaml").write_text(
        "compose: [run]\n"
        "model: {class_path: tests.cli.test_encode_split.Stopping, "
        "init_args: {width: 8, interaction: frames}}\n"
        "data: {class_path: FolderData, init_args: {root: ., annotations: clips.csv, seconds: 2, "
        "batch_size: 2, fractions: [0.6, 0.4]}}\n"
        "trainer: {accelerator: cpu, logger: false, enable_progress_bar: false}\n"
    )


def given(output: str) -> tuple[str, ...]:
    return ("encode", "--config", "mine.yaml", "--split", "all", "--output", output)


def stop_after(patch: pytest.MonkeyPatch, count: int, by: str) -> None:
    patch.setenv("STOP_AFTER", str(count))
    patch.setenv("STOP_BY", by)


def assert_same_file(found: str, expected: str) -> None:
    one, other = EncodedPairs.load(Path(found)), EncodedPairs.load(Path(expected))
    for name in (field.name for field in fields(EncodedPairs)):
        left, right = getattr(one, name), getattr(other, name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, name


def encode_on_rank(folder: Path) -> list[int]:
    os.chdir(folder)
    counts = []
    for size in (2, 6, 32):
        Stopping.count = 0
        together = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", size)
        ask_lightning(*given(f"two-{size}.safetensors"), *together)
        counts.append(Stopping.count)
    return counts


def test_two_processes_write_the_file_of_one():
    counts = on_ranks(2, encode_on_rank, Path.cwd(), grouped=False)
    assert counts == [[4, 2, 1], [4, 1, 0]]
    for size in (2, 6, 32):
        ask_lightning(*given(f"one-{size}.safetensors"), "--data.batch_size", size)
        assert_same_file(f"two-{size}.safetensors", f"one-{size}.safetensors")
    assert len(set(EncodedPairs.load(Path("two-2.safetensors")).audio_lengths.tolist())) > 1
    assert not list(Path().glob("*.parts"))


@pytest.mark.parametrize(("by", "code"), [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_goes_on_with_the_parts_that_are_missing(by, code, monkeypatch):
    kept = 6 if by == "SIGTERM" else 5  # the batch in which the process is asked to end is finished
    with monkeypatch.context() as patch:
        stop_after(patch, 5, by)
        # The server that starts processes has the environment of the first test.
        with started(Path("said.txt"), *given("a.safetensors"), environment=dict(os.environ)) as process:
            process.join(120)
            assert process.exitcode == code
    said = Path("said.txt").read_text()
    assert (f"{kept} parts are kept in a.safetensors.parts: the same command goes on" in said) == (
        by != "SIGKILL"
    )
    assert not Path("a.safetensors").exists()
    ask_lightning(*given("a.safetensors"))
    assert Stopping.count == NUM_BATCHES - kept
    ask_lightning(*given("b.safetensors"))
    assert_same_file("a.safetensors", "b.safetensors")
    assert not Path("a.safetensors.parts").exists()


@pytest.mark.parametrize("changed", ["nothing", "tokens", "weights", "model", "caption", "audio", "damage"])
def test_parts_are_reused_for_the_same_work_alone(changed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 3, "error")
        assert refusal(capsys, *given("a.safetensors")) == "no file any more"
    assert len(list(Path("a.safetensors.parts/all").iterdir())) == 3
    flags: list[str] = []
    if changed == "tokens":
        flags = ["--tokens", "float16"]
    elif changed == "weights":
        flags = ["--seed_everything", "1"]
    elif changed == "model":
        flags = ["--model.temperature", "0.5"]
    elif changed == "caption":
        table = Path("clips.csv")
        table.write_text(table.read_text().replace("wind 4", "a storm"))
    elif changed == "audio":
        soundfile.write("4.wav", np.zeros(8000), 16000)
    elif changed == "damage":
        part = next(Path("a.safetensors.parts/all").iterdir())
        part.write_bytes(part.read_bytes()[:-1])
    Stopping.count = 0
    ask_lightning(*given("a.safetensors"), *flags)
    assert Stopping.count == NUM_BATCHES - {"nothing": 3, "damage": 2}.get(changed, 0)
    ask_lightning(*given("b.safetensors"), *flags)
    assert_same_file("a.safetensors", "b.safetensors")


def test_two_runs_do_not_write_the_same_file(capsys, monkeypatch):
    with monkeypatch.context() as patch:

        def encode_again(*_, **__):
            patch.undo()
            run(list(given("a.safetensors")))

        patch.setattr("ask_lightning.cli.trainer.encode_split", encode_again)
        message = refusal(capsys, *given("a.safetensors"))
    assert message.startswith("Another run is writing to a.safetensors.parts at this moment.")
    assert message.endswith("or pass another path as `--output`.")


def test_the_limit_of_batches_is_that_of_the_whole_split(monkeypatch, capsys):
    limit = ("--trainer.limit_predict_batches", 0.5)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, "error")
        refusal(capsys, *given("a.safetensors"), *limit)
    ask_lightning(*given("a.safetensors"), *limit)
    assert len(EncodedPairs.load(Path("a.safetensors")).captions) == NUM_BATCHES
    message = refusal(capsys, *given("a.safetensors"), "--trainer.limit_predict_batches", 0)
    assert message.startswith("There is no batch to encode.")


def test_parts_under_a_limit_are_no_parts_of_the_whole(monkeypatch, capsys):
    rows = [f"{number % 5}.wav,caption {number}" for number in range(130)]
    Path("clips.csv").write_text("\n".join(["filename,caption", *rows]))
    with monkeypatch.context() as patch:
        stop_after(patch, 3, "error")
        refusal(capsys, *given("a.safetensors"), "--trainer.limit_predict_batches", 0.5)
    assert len(list(Path("a.safetensors.parts/all").iterdir())) == 3  # of a batch, those of the whole of two
    ask_lightning(*given("a.safetensors"))
    assert len(EncodedPairs.load(Path("a.safetensors")).captions) == len(rows)


def test_clips_of_joined_datasets_have_names_style_and_rate():
    data = ("--data", "tests.cli.test_encode_split.Joined", "--data.batch_size", 2)
    ask_lightning(*given("a.safetensors"), *data, "--split", "test")
    pairs = EncodedPairs.load(Path("a.safetensors"))
    assert list(pairs.names) == ["file:0.wav", "file:2.wav"]
    assert list(pairs.files) == ["0.wav", "2.wav"]
    assert (pairs.caption_style, pairs.sample_rate) == ("plain", 16000)


@pytest.mark.parametrize("features", ["null", "log_mel"])
def test_an_audio_query_is_heard_as_the_clips_are(features):
    data = ("--data.features", features, "--model.interaction", "null")
    model = ask_lightning(*given("a.safetensors"), *data).model.eval()
    pairs = EncodedPairs.load(Path("a.safetensors"))
    assert pairs.log_mel == ({"seconds": 2, "num_mels": 64} if features == "log_mel" else None)
    with torch.inference_mode():
        for row, name in enumerate(pairs.files):
            heard = _hear(model, pairs, Path(name))[0]
            torch.testing.assert_close(heard, pairs.audio[row], rtol=0, atol=1e-3)


@pytest.mark.parametrize("source", ["checkpoint", "exported"])
def test_an_audio_query_is_heard_at_the_rate_of_the_clips_and_not_of_the_training(source):
    trained = TinyRetriever(width=8, sample_rate=16000)
    save_checkpoint(trained, Path("a.ckpt"))
    save_pretrained(trained, Path("exported"))
    model, rate = ("--model", "ask_lightning.models.TinyRetriever"), 8000
    rates = ("--model.interaction", "null", "--model.sample_rate", rate, "--data.sample_rate", rate)
    ask_lightning(*given("a.safetensors"), *model, *rates, "--ckpt_path", "a.ckpt")
    pairs = EncodedPairs.load(Path("a.safetensors"))
    assert pairs.sample_rate == rate
    loaded = load_model(pairs, None if source == "checkpoint" else "exported")
    with torch.inference_mode():
        for row, name in enumerate(pairs.files):
            heard = _hear(loaded, pairs, Path(name))[0]
            torch.testing.assert_close(heard, pairs.audio[row], rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_batches", [0, 1, 64, 65, 4096, 4097, 100_000])
def test_parts_hold_each_batch_once_in_order(num_batches):
    parts = batches_of_parts(num_batches)
    assert [batch for part in parts for batch in part] == list(range(num_batches))
    assert max((len(part) for part in parts), default=1) <= 64
    assert num_batches > 4096 or len(parts) <= 64


def test_parts_of_another_identity_are_removed_and_other_files_are_not():
    own, other = EncodedParts(Path("parts"), "a"), EncodedParts(Path("parts"), "b")
    own.write(0, {"audio": torch.ones(2, 3)}, ["one", "zwölf"])
    other.write(1, {"audio": torch.ones(2, 3)}, ["two", "three"])
    Path("parts/note.txt").touch()
    assert own.remove_others() == 1
    assert own.find() == {0}
    assert own.read(0)[1] == ["one", "zwölf"]
    own.remove()
    assert [path.name for path in Path("parts").iterdir()] == ["note.txt"]
