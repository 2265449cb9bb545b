"""The command that reproduces tables and figures."""

import subprocess
import sys
from pathlib import Path

import pytest

from ask_lightning.cli import main, run
from ask_lightning.cli.errors import UsageError
from tests.reproduce.small_tasks import write_pairs


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "pairs").mkdir()
    files = write_pairs(tmp_path / "pairs")
    given = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    return ["--data", "embeddings", *given, "--width", "8", "--output", str(tmp_path / "out")]


def test_a_figure_is_written_and_a_repeated_command_trains_nothing(flags, tmp_path, capsys):
    texts = run(["reproduce", "figure6", "table4", *flags, "--quick"])
    assert list(texts) == ["figure6"]
    out = capsys.readouterr().out
    assert "Table 4 is left out: the model of embeddings is not compared by tokens." in out
    assert "6 runs to do, 0 are there." in out
    folder = tmp_path / "out" / "embeddings"
    assert {path.suffix for path in folder.glob("figure6.*")} == {".md", ".tex", ".png", ".svg"}
    assert not (folder / ".lock").exists()
    assert run(["reproduce", "figure6", *flags, "--quick"]) == texts
    assert "0 runs to do, 6 are there." in capsys.readouterr().out
    flags[flags.index("--width") + 1] = "6"
    assert main(["reproduce", "figure6", *flags, "--quick"]) == 2
    error = capsys.readouterr().err
    assert "holds runs under another protocol: width 8 → 6. Use another folder" in error.splitlines()[-1]


@pytest.mark.slow
def test_table_1_of_audiocaps_is_continued_by_another_process(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path(demo.removeprefix("--demo="))
    arguments = ["reproduce", "table1", "--data", "audiocaps", "--root", str(folder / "AudioCaps")]
    arguments += ["--wavcaps", str(folder / "WavCaps"), "--backbone", "tiny", "--quick"]
    texts = run([*arguments, "--seeds", "1"])
    assert "ASK, knowledge: WavCaps" in texts["table1"]
    assert "paper, AudioCaps: A2T" in texts["table1"]
    out = capsys.readouterr().out
    assert "audiocaps: 24 train, 30 val, 30 test\nPretrained with NT-Xent for 2 epochs" in out
    command = [sys.executable, "-m", "ask_lightning", *arguments, "--seeds", "1"]
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "0 runs to do, 5 are there." in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "embeddings"], "Say first what to reproduce: table1"),
        (["table9", "--data", "embeddings"], "There is no 'table9', only table1"),
        (["table2"], "--data"),
        (["table2", "--data", "embeddings", "--quick"], "audio"),
        (["table2", "--data", "embeddings", "--seeds", "0"], "`--seeds` has to be at least 1"),
        (["table2", "--data", "embeddings", "--candidates", "9"], "`--candidates` has to be at most 8"),
        (["table2", "--data", "embeddings", "--jobs", "0"], "`--jobs`"),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(UsageError, match=message):
        run(["reproduce", *arguments])


def test_files_that_are_not_there_are_one_line(flags, capsys):
    flags[flags.index("--pairs") + 1] = "nowhere.csv"
    assert main(["reproduce", "table2", *flags]) == 2
    assert "nowhere.csv" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_said_before_the_work(flags, tmp_path, capsys):
    (tmp_path / "out").touch()
    assert main(["reproduce", "table2", *flags]) == 2
    said = capsys.readouterr()
    assert f"{tmp_path / 'out'} is no folder, or a read-only one. Pass a folder of your own" in said.err
    assert not said.out


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("captions", ("--captions_per_clip", "--folder")),
        (
            "clotho",
            ("--root", "--wavcaps", "--enriched", "--transfer_root", "--backbone", "small model for a"),
        ),
    ],
)
def test_help_lists_names_and_the_flags_of_the_data(capsys, data, flags):
    with pytest.raises(SystemExit):
        run(["reproduce", "--data", data, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for text in ("figure7", "noise", *flags):
        assert text in out
