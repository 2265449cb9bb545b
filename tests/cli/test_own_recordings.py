"""One's own recordings: names of configs, columns that are found, flags that do not exist."""

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ask_lightning import cli
from ask_lightning.cli import check, inspect_data, run
from ask_lightning.cli.compose import compose, shipped_configs, shipped_roles
from ask_lightning.cli.errors import UsageError
from ask_lightning.data import FolderData, write_recordings
from tests.helpers.command_line import ask_lightning, csv_rows, refusal
from tests.helpers.retrievers import CLAP

PLACES = {"run": "runs/x", "datasets": "data", "weights": "weights"}


def test_a_dataset_may_be_left_out():
    configs = shipped_configs()
    for model in shipped_roles().models:
        assert configs[f"{model}_ask"] == ["run", "recordings", model, "ask"]
        config = compose([model], PLACES).config
        assert config["data"]["class_path"] == "ask_lightning.data.FolderData"
        assert config["data"]["init_args"]["sample_rate"] == config["model"]["init_args"]["sample_rate"]
    assert compose(["my_recordings"], PLACES).parts == ["run", "recordings", "tiny", "teacher"]


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--data.rot", "--data.root"),
        ("--trainer.max_epoch", "--trainer.max_epochs"),
        ("--modle.width", "--model.width"),
        ("--ask.refresh.num_prototype", "--ask.refresh.num_prototypes"),
    ],
)
def test_a_wrong_flag_names_the_right_one(flag, near):
    with pytest.raises(UsageError, match=f"unrecognized arguments: {flag} 3. Did you mean {near}"):
        check(["fit", "--config", "my_recordings", flag, "3"])


def test_wrong_flags_and_help_need_no_lightning():
    code = """
import contextlib, sys
from ask_lightning.cli import main
for arguments in (
    ["fit", "--config", "clap_ask", "--data.rot", "x"],
    ["inspect", "--config", "my_recordings", "--data.root", "x", "--picure", "y"],
    ["search", "clips.safetensors", "--txt", "rain"],
    ["search", "clips.safetensors", "--text", "rain", "--top", "0"],
    ["serve", "clips.safetensors", "--audio", ".", "--port", "70000"],
    ["no-such-command"],
):
    assert main(arguments) == 2, arguments
for arguments in (["--help"], ["search", "--help"], ["serve", "--help"]):
    with contextlib.suppress(SystemExit):
        main(arguments)
assert "lightning" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == 6, done.stderr


def test_splits_of_the_table_are_kept(tmp_path):
    write_recordings(tmp_path, num_clips=12, seconds=0.5)
    rows = (tmp_path / "clips.csv").read_text().splitlines()
    names = ["train"] * 6 + ["dev"] * 3 + ["evaluation"] * 3
    lines = [f"{row},{name}" for row, name in zip(rows[1:], names, strict=True)]
    (tmp_path / "clips.csv").write_text("\n".join([f"{rows[0]},split", *lines]))
    data = FolderData(tmp_path, seconds=0.5)
    assert {name: len(part.clips) for name, part in data.datasets.items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    assert len(data.ordered_dataloader("all").dataset.clips) == 12


def test_inspect_prints_json_alone(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_recordings(tmp_path / "own", num_clips=12, seconds=0.5)
    run(["inspect", "--config", "my_recordings", "--data.root", str(tmp_path / "own"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert sum(split["clips"] for split in found["splits"].values()) == 12
    assert (tmp_path / "runs/my_recordings/inspect.png").is_file()


def test_inspect_counts_the_clips_of_which_a_part_is_heard(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_recordings("own", num_clips=20, seconds=0.5)
    inspect = ["inspect", "--config", "my_recordings", "--data.root", "own", "--data.seconds"]
    run([*inspect, "0.3"])
    assert "20 clips are longer than the 0.3 s that are heard of a clip" in capsys.readouterr().out
    run([*inspect, "0.5"])
    assert "that are heard" not in capsys.readouterr().out


def test_inspect_takes_the_captions_of_takes_for_those_of_one_recording(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_recordings("own", num_clips=20, seconds=0.5)
    files = sorted(path.relative_to("own") for path in Path("own").rglob("sound-*"))
    takes = [f"{file},sound {number // 2},{number // 2}" for number, file in enumerate(files)]
    Path("takes.csv").write_text("\n".join(["file,caption,clip_id", *takes]))
    inspect = ["inspect", "--config", "my_recordings", "--data.root", "own", "--data.annotations"]
    run([*inspect, "takes.csv"])
    assert "words of a caption of another clip" not in capsys.readouterr().out
    Path("clips.csv").write_text(Path("takes.csv").read_text().replace("clip_id", "session"))
    run([*inspect, "clips.csv"])
    assert "20 captions have the words of a caption of another clip" in capsys.readouterr().out


def test_inspect_shows_a_handful_of_clips_that_have_no_splits(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_recordings(tmp_path / "own", num_clips=3, seconds=0.5)
    inspect = ["inspect", "--config", "my_recordings", "--data.root", str(tmp_path / "own"), "--json"]
    run(inspect)
    captured = capsys.readouterr()
    assert {name: split["clips"] for name, split in json.loads(captured.out)["splits"].items()} == {"all": 3}
    assert "no splits, so they are one, `all`: Part 2 of `fractions`" in captured.err
    for path in (tmp_path / "own").rglob("sound-*"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="No clip is left that can be used"):
        run(inspect)


@pytest.fixture(scope="module")
def trained_recordings(demo, tmp_path_factory):
    """The folder of a finished run on recordings."""
    run_folder = tmp_path_factory.mktemp("recordings") / "run"
    ask_lightning("fit", "--config", "my_recordings", demo, "--run", run_folder, "--trainer.max_epochs", 1)
    return run_folder


def test_another_rate_than_that_of_the_training_is_told(demo, trained_recordings):
    """The small model has no rate of its own to which it would resample."""
    flags = ("--data.sample_rate", 8000, "--model.sample_rate", 8000, "--calibrate", "false")
    given = ("--config", "my_recordings", demo, "--run", trained_recordings, "--ckpt_path", "best")
    with pytest.warns(UserWarning, match="was trained with sample_rate=16000, but it is 8000 now"):
        ask_lightning("test", *given, *flags)


def test_other_splits_than_those_of_the_training_are_told(demo, trained_recordings, tmp_path):
    given = ("--config", "my_recordings", demo, "--run", trained_recordings, "--ckpt_path", "best")
    with pytest.warns(UserWarning, match=r"trained on other splits \(split_seed=3 in place of 0\): valida"):
        ask_lightning("validate", *given, "--data.split_seed", 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*trained on other splits")
        ask_lightning("validate", *given)
        whole = ("--split", "all", "--output", tmp_path / "all.safetensors")
        ask_lightning("encode", *given, "--data.split_seed", 3, *whole)


def test_another_form_of_clips_than_in_the_training_is_told(demo, trained_recordings):
    given = ("--config", "my_recordings", demo, "--run", trained_recordings, "--ckpt_path", "best")
    told = (
        r"with clips or captions of another form \(seconds=1.5 in place of .*, caption_style='plain' in place"
    )
    with pytest.warns(UserWarning, match=told):
        ask_lightning("validate", *given, "--data.seconds", 1.5, "--data.caption_style", "plain")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*of another form")
        ask_lightning("validate", *given)


def test_other_batches_than_those_of_the_training_are_told(demo, trained_recordings):
    given = ("--config", "my_recordings", demo, "--run", trained_recordings, "--ckpt_path", "best")
    ended = (*given, "--trainer.max_epochs", 1)  # there is nothing left to train
    with pytest.warns(UserWarning, match=r"trained with other batches \(seed=3 in place of 0\), so the run"):
        ask_lightning("fit", *ended, "--seed_everything", 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*trained with other batches")
        ask_lightning("validate", *given, "--seed_everything", 3)
        ask_lightning("fit", *ended, "--seed_everything", 3)  # which the run has meanwhile


def test_what_training_has_brought_is_a_table_and_json(demo, trained_recordings, capsys):
    flags = ["test", "--config", "my_recordings", demo, "--run", str(trained_recordings)]
    run([*flags, "--ckpt_path", "best", "--untrained", "true", "--json", "true", "--calibrate", "false"])
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert 0 <= said["metrics"]["test/mean_recall"] <= 1
    assert said["checkpoint"] == str(trained_recordings / "checkpoints" / "best.ckpt")
    assert "untrained" in captured.err, "the tables go to the standard error"
    tested = max((trained_recordings / "logs").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    assert (tested / "config.yaml").is_file()
    assert not (trained_recordings / "config.yaml").exists()
    before, after = csv_rows(trained_recordings / "untrained.csv")
    assert [next(iter(row.values())) for row in (before, after)] == ["untrained", "trained"]
    percent = said["untrained_percent"]
    assert percent
    assert all(0 <= value <= 100 for value in percent.values())
    assert "compares a checkpoint with the model before it was trained" in refusal(
        capsys, *flags, "--untrained", "true"
    )


def test_a_model_without_a_checkpoint_encodes_and_searches(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    write_recordings(tmp_path / "own", num_clips=6, seconds=0.5)
    torch.manual_seed(0)
    published = transformers.ClapModel(transformers.ClapConfig(**CLAP))
    published.save_pretrained(tmp_path / "clap")
    model = ["--model.weights", "clap", "--model.tokenizer", "hashed", "--model.max_seconds", "1"]
    data = ["--data.root", "own", "--data.seconds", "0.5", "--data.num_workers", "0"]
    shown = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    cli = ask_lightning(
        *("encode", "--config", "clap", *model, *data, *shown, "--split", "all", "--output", "a.safetensors")
    )
    capsys.readouterr()
    hits = run(["search", "a.safetensors", "--text", "a dog", "--top", "3", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [hit["clip"] for hit in printed] == [hit.clip for hit in hits]
    assert set(printed[0]) == {"score", "cosine", "clip", "caption", "row"}
    pairs = cli.trainer.encode(cli.model, cli.datamodule, "all", "b.safetensors")
    with torch.inference_mode():
        query = cli.model.eval().encode_text({"caption": ["a dog"]})[0]
    scores, rows = (pairs.audio @ (query / query.norm())).topk(3)
    assert [hit["row"] for hit in printed] == rows.tolist()
    assert [hit["score"] for hit in printed] == pytest.approx(scores.tolist(), abs=1e-5)

    torch.manual_seed(1)
    transformers.ClapModel(transformers.ClapConfig(**CLAP)).save_pretrained(tmp_path / "clap")
    message = refusal(capsys, "search", "a.safetensors", "--text", "a dog")
    assert message.startswith("The file was encoded without a checkpoint, by other weights than the model")
    Path("clap").rename("moved")
    assert "clap" in refusal(capsys, "search", "a.safetensors", "--text", "a dog")


def test_the_next_command_repeats_what_it_needs(demo, tmp_path, capsys):
    write_recordings(tmp_path / "my sounds", num_clips=12, seconds=0.5)
    flags = ["--config", "my_recordings", "--data.root", "my sounds", "--run", "my run"]
    shrunk = ["--model.width", "8", "--data.batch_size", "4", "--data.num_workers", "0"]
    few = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.seconds", "0.5"]
    ask_lightning("fit", *flags, *shrunk, *few)
    said = capsys.readouterr().err
    given = (
        "--config my_recordings --data.root 'my sounds' --model.width 8 --data.batch_size 4 "
        "--data.num_workers 0 --data.seconds 0.5 --run 'my run'"
    )
    assert f"Next: ask-lightning test {given} --ckpt_path best" in said
    assert f"Then: ask-lightning encode {given} --ckpt_path best --split all" in said
    assert "Then: ask-lightning serve sounds.safetensors --audio 'my sounds'\n" in said
    few = ["--trainer.enable_progress_bar", "false", "--data.seconds", "0.5", "--ckpt_path", "best"]
    ask_lightning("test", *flags, *shrunk, *few, "--calibrate", "false")
    assert f"Next: ask-lightning encode {given} --ckpt_path " in capsys.readouterr().err
    ask_lightning("encode", *flags, *shrunk, *few, "--split", "all", "--output", "all of it.safetensors")
    assert capsys.readouterr().err.endswith(
        "Next: ask-lightning search 'all of it.safetensors' --text \"a dog barks\"\n"
        "Then: ask-lightning serve 'all of it.safetensors' --audio 'my sounds'\n"
    )


def test_a_run_without_validation_has_no_best_epoch_to_go_on_with(tmp_path, capsys):
    write_recordings(tmp_path / "own", num_clips=12, seconds=0.5)
    flags = [
        "--config",
        "my_recordings",
        "--data.root",
        "own",
        "--model.width",
        "8",
        "--data.num_workers",
        "0",
    ]
    few = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.batch_size", "4"]
    ask_lightning("fit", *flags, *few, "--trainer.limit_val_batches", "0")
    said = capsys.readouterr().err
    assert "The run is in runs/my_recordings, its last epoch in checkpoints/last.ckpt." in said
    assert Path("runs/my_recordings/checkpoints/last.ckpt").is_file()
    assert said.count(" --ckpt_path last") == 2
    assert "best" not in said.partition("The run is in")[2]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect", "ask-lightning: inspect was ended by Ctrl-C; the same command begins anew.\n"),
        ("reproduce", "ask-lightning: reproduce was ended by Ctrl-C; the same command goes on"),
        ("serve", ""),  # which ends in no other way
        # Which says by itself whether there is a checkpoint.
        ("fit", "ask-lightning: fit was ended by Ctrl-C.\n"),
    ],
)
@pytest.mark.parametrize("swallowed", [False, True])
def test_after_ctrl_c_a_command_says_how_to_go_on(command, said, swallowed, monkeypatch, capsys):
    def interrupt(arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not swallowed:
                raise
        raise ValueError("a library has taken Ctrl-C for an error of its own")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "run", interrupt)
    monkeypatch.setattr(cli, "check", lambda arguments: None)
    try:
        assert cli.main([command]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    written = capsys.readouterr().err
    assert written.startswith(said)
    assert len(written.splitlines()) == bool(said)


def test_an_inspection_that_is_ended_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_data, "summarize", interrupt)
    write_recordings(tmp_path / "own", num_clips=12, seconds=0.5)
    assert cli.main(["inspect", "--config", "my_recordings", "--data.root", str(tmp_path / "own")]) == 130
    assert capsys.readouterr().err.endswith("begins anew.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
