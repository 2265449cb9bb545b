"""The examples run in their short form and print what they promise."""

import csv
import logging
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TEST_ROW = re.compile(r"^\W*test +\d", re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in a folder of the test's own and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    logging.getLogger("lightning.pytorch").setLevel(level)


@pytest.mark.parametrize("flags", [(), ("--baseline",)])
def test_audiocaps(run, flags):
    out = run("audiocaps", "--demo", *flags)
    assert "validation, best epoch (" in out
    assert len(TEST_ROW.findall(out)) == 1
    assert len(list(Path("runs/audiocaps").glob("**/queries-*.csv"))) == (0 if flags else 2)


def test_clotho(run):
    out = run("clotho", "--demo")
    assert "Trained on Clotho, tested on Clotho:" in out
    assert "Trained on Clotho, tested on AudioCaps:" in out
    assert len(TEST_ROW.findall(out)) == 2


def test_wrap_clap(run):
    out = run("wrap_clap", "--demo")
    assert out.index("As it was pretrained:") < out.index("Fine-tuned with ASK:")
    assert len(TEST_ROW.findall(out)) == 2
    with pytest.raises(SystemExit, match="Pass --root"):
        run("wrap_clap")


def test_wrap_your_model(run):
    out = run("wrap_your_model", "--clips", "64", "--epochs", "1")
    assert "-    model = Towers()\n" in out
    assert "+    model = ASKModule(Towers())\n" in out
    changed = [line for line in out.splitlines() if line.startswith(("+ ", "- "))]
    assert len(changed) == 4, "two lines, each before and after"
    assert "after   validation R@10: a2t 0." in out
    assert "with_ask.ckpt loads in Towers." in out


def test_caption_retrieval(run, tmp_path):
    words = ["rain", "wind", "dog", "bell", "car", "door", "crowd"]
    random = np.random.default_rng(0)
    np.save(tmp_path / "caption_1_embeddings.npy", random.standard_normal((120, 8), np.float32))
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip_id", *(f"caption_{number}" for number in range(2, 6))])
        writer.writerows(
            [f"{clip}.wav", *(" ".join(random.choice(words, 3)) for _ in range(4))] for clip in range(120)
        )
    out = run(
        "caption_retrieval",
        *("--data", str(tmp_path), "--epochs", "2", "--T", "1", "--seeds", "1", "--candidates", "1"),
    )
    assert "Pairs: 328 train, 64 val, 88 test." in out
    for method in ("NT-Xent", "Label smoothing", "ASK", "Teacher"):
        assert re.search(rf"^\| {method} \| [^|]*temperature=", out, re.MULTILINE)
    assert "minus Label smoothing" in out
    assert len(Path("runs/captions/runs.csv").read_text().splitlines()) == 5
    assert Path("runs/captions/comparison.png").exists()


def test_frozen_embeddings(run, tmp_path):
    random = np.random.default_rng(0)
    for side in ("audio", "text"):
        np.save(tmp_path / f"{side}.npy", random.standard_normal((120, 8), np.float32))
    rows = "".join(f"{clip}.wav,{clip // 2}\n" for clip in range(120))
    (tmp_path / "pairs.csv").write_text("filename,clip_id\n" + rows)
    inputs = [f"--{side}={tmp_path / side}.npy" for side in ("audio", "text")]
    short = ("--epochs", "2", "--T", "1", "--seeds", "2", "--candidates", "1", "--prototypes", "4")
    losses = ("--methods", "NT-Xent", "Triplet", "Teacher")
    out = run("frozen_embeddings", *inputs, "--pairs", str(tmp_path / "pairs.csv"), *short, *losses)
    assert "Pairs: 84 train, 18 val, 18 test" in out
    for method in ("NT-Xent", "Triplet", "Teacher"):
        assert re.search(rf"^\| {method} \| [^|]*learning_rate=0.001", out, re.MULTILINE)
    assert "minus NT-Xent" in out
    assert "minus Label smoothing" not in out


@pytest.mark.parametrize("pretraining", [0, 1])
def test_quickstart(run, pretraining):
    scenes = ("--scenes", "16", "--test-scenes", "8", "--pretraining-scenes", "16", "--batch-size", "8")
    short = (
        "--epochs",
        "1",
        "--T",
        "1",
        "--seeds",
        "1",
        "--candidates",
        "1",
        "--prototypes",
        "4",
        "--jobs",
        "1",
    )
    out = run("quickstart", *scenes, *short, "--pretraining-epochs", str(pretraining))
    assert "Audio–caption pairs: 16 train, 24 val, 24 test" in out
    assert ("Pretrained with NT-Xent for 1 epochs" in out) == bool(pretraining)
    assert len(list(Path("runs/quickstart").glob("pretrained-*.pt"))) == pretraining
    for method in ("NT-Xent", "Label smoothing", "ASK", "Teacher"):
        assert re.search(rf"^\| {method} \| [^|]*temperature=", out, re.MULTILINE)
    assert Path("runs/quickstart/comparison.png").exists()
    if pretraining:  # a repeated command finds everything finished
        again = run("quickstart", *scenes, *short, "--pretraining-epochs", str(pretraining))
        assert "Pretrained" not in again
        assert "[1/" not in again
        with pytest.raises(
            SystemExit, match=r"holds runs under another protocol: .*Use another folder"
        ) as ended:
            run("quickstart", *scenes, *short, "--pretraining-epochs", str(pretraining), "--T", "2")
        assert "\n" not in str(ended.value)


def test_paper_options(run, tmp_path):
    random = np.random.default_rng(0)
    for name in ("audio", "text"):
        np.save(tmp_path / f"{name}.npy", random.standard_normal((120, 8), np.float32))
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["clip_id"], *([f"{row // 2}.wav"] for row in range(120))])
    variant = "distinct_clips=true num_prototypes=5 transport_solver=pot:sinkhorn_unbalanced;reg_m=1.0"
    out = run(
        "paper_options",
        *("--audio", "audio.npy", "--text", "text.npy", "--pairs", "pairs.csv", "--width", "8"),
        *("--variants", variant, "--temperature", "0.1", "--seeds", "2"),
        *("--epochs", "1", "--T", "1", "--prototypes", "4"),
    )
    assert re.search(rf"^\| {re.escape(variant)} \| temperature=0.1 \| 2 \| raw \|", out, re.MULTILINE)
    assert re.search(rf"^\| {re.escape(variant)} \| raw \| [+-]\d", out, re.MULTILINE), "minus ASK"


@pytest.mark.parametrize(
    ("table", "flags", "message"),
    [
        ("filename,title\na.wav,rain", (), r"no column 'caption'.*`--filename-column`, `--caption-columns`"),
        ("filename;caption\na.wav;rain", (), r"a\.wav: the file does not exist"),
        ("file,caption\na.wav,rain", (), r"a\.wav: the file does not exist"),
        ("filename,caption\na.wav,rain", (), r"a\.wav: the file does not exist"),
        ("", ("--annotations", "none.csv"), r"There is no file at none\.csv"),
        ("", ("--root", "nowhere"), r"nowhere\. Correct `--root`"),
    ],
)
def test_quickstart_names_its_own_options_in_one_line(run, table, flags, message):
    Path("clips.csv").write_text(table)
    with pytest.raises(SystemExit, match=message) as ended:
        run("quickstart", "--data", "folder", "--root", ".", "--annotations", "clips.csv", *flags)
    assert "\n" not in str(ended.value)


def test_quickstart_refuses_batches_that_the_clips_do_not_fill(run):
    with pytest.raises(SystemExit, match=r"do not fill a batch of 64: .* Lower `--batch-size`\."):
        run("quickstart", "--scenes", "8", "--test-scenes", "8", "--batch-size", "64")
