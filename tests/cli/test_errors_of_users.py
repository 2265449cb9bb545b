"""What users get wrong on the command line: one line each, which says what and what to do.

What jsonargparse says itself differs between its versions; of that only the name is looked for.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ask_lightning as ask_lightning_package
from ask_lightning.cli import main
from ask_lightning.cli.demo_data import write_demo_data
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.run_lock import locked_run
from tests.helpers.command_line import ASK, BASELINE, ask_lightning, refusal, started, wait_for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ft"],
            "There is no command 'ft', only fit, validate, test, predict, encode, search, serve, "
            "export, transfer, inspect, reproduce.",
        ),
        (["fit", "--config", "nope"], "There is no config 'nope'. Shipped are DATASET_MODEL_LOSS and "),
        (["fit", "--config", "nope.yaml"], "There is no config file 'nope.yaml'"),
        (["fit", "--config"], "argument -c/--config: expected one argument. See `ask-lightning --help`."),
        (["fit"], "`fit` needs a model and data, so a config is required: pass `--config NAME`."),
        (
            ["fit", "DEMO", "--datasets", "mine"],
            "--demo writes datasets of its own and would not read those in",
        ),
        (
            ["fit", "DEMO", "--data", "SoundscapeData"],
            "of shipped parts only, but `data` is given by --data. L",
        ),
        (
            ["fit", "DEMO", "--model.class_path=mine.Model"],
            "but `model` is given by --model.class_path=mine.M",
        ),
        (
            ["fit", "DEMO", "--data.exclude", "no.txt"],
            "AudioCaps train: there is no exclusion list at no.txt.",
        ),
        (["fit", "--demo"], "--demo shrinks the shipped parts of a config, but the config names none"),
        (
            ["fit", "--config", ASK],
            "names weights that are not there: no file 'weights/ResNet38_mAP=0.434.pth'",
        ),
        (["fit", "--config", ASK, "--weights", "/w"], "no file '/w/ResNet38_mAP=0.434.pth'. Download"),
        (
            ["fit", "--config", "clotho_ced_sonar_ask"],
            "no file or folder 'mispeech/ced-base', and the Hugging",
        ),
        (["fit", "DEMO", "--data.batch_sze", "3"], "batch_sze"),
        (["fit", "DEMO", "--modle.width", "3"], "nrecognized arguments: --modle.width 3"),
        (["fit", "DEMO", "--trainer.max_epoch", "3"], "nrecognized arguments: --trainer.max_epoch 3"),
        (["fit", "DEMO", "--data.batch_size", "q"], "\"batch_size\": Expected a <class 'int'>. Got value: q"),
        (
            ["fit", "DEMO", "--data.batch_size", "1"],
            "`batch_size` has to be an integer of at least 2, but got 1",
        ),
        (
            ["fit", "DEMO", "--ask.loss.injection_ratio", "3"],
            "`injection_ratio` has to be in [0, 1], but got",
        ),
        (["fit", "DEMO", "--ask.loss.plan_scaling", "x"], 'Parser key "plan_scaling": '),
        (
            ["fit", "DEMO", "--ask.refresh.T", "0"],
            'Argument `T` has to be an integer of at least 1 or "auto", but got 0',
        ),
        (["fit", "DEMO", "--ask.audio", "listen"], "has no method 'listen'"),
        (["fit", "DEMO", "--data.root", "/nowhere"], "There is no folder of a dataset at /nowhere"),
        (["fit", "DEMO", "--data.knowledge", "/nowhere"], "/nowhere"),
        (
            ["fit", "DEMO", "--data.sample_rate", "16000"],
            "waveforms have 32000 Hz, but the data have 16000 Hz",
        ),
        (
            ["fit", "DEMO", "--ckpt_path", "last"],
            "There is no checkpoint 'runs/demo-audiocaps_resnet38_bert_ask",
        ),
        (
            ["test", "DEMO", "--ckpt_path", "x.ckpt"],
            "There is no checkpoint 'x.ckpt'; in the folder of the run",
        ),
        (["encode", "DEMO", "--split", "tset"], 'Parser key "split": '),
        (["encode", "DEMO", "--output", "a.npz"], "`output` has to end with .safetensors, but got 'a.npz'"),
        (["search"], "the following arguments are required: encoded. See"),
        (["search", "a.safetensors"], "one of the arguments --text --audio is required"),
        (["search", "a.safetensors", "--text", "rain"], "There is no file 'a.safetensors'. Write it with"),
        (["search", "a", "--text", "rain", "--top", "0"], "`--top` has to be at least 1, but got 0"),
        (["transfer", "DEMO"], "the following arguments are required: --target"),
        (["transfer", "DEMO", "--target", "esc"], "invalid choice: 'esc' (choose from"),
        (["transfer", "DEMO", "--target", "audiocaps"], "The config trains on audiocaps already"),
        (["transfer", "DEMO", "--target", "clotho", "--target.root", "/nowhere"], "at /nowhere"),
        (
            ["transfer", "DEMO", "--target", "clotho", "--target.rot", "/"],
            "Problem with given class_path 'ask_lightning.data.ClothoData'",
        ),
    ],
)
def test_one_line(arguments, message, demo, capsys):
    given = [word for part in arguments for word in (["--config", ASK, demo] if part == "DEMO" else [part])]
    assert message in refusal(capsys, *given)


FOLDER = """
compose: [run]
model: {class_path: TinyRetriever}
data: {class_path: FolderData, init_args: {root: ., annotations: clips.csv, seconds: 0.1, batch_size: 2}}
trainer: {accelerator: cpu, max_epochs: 1}
"""


def test_the_demo_of_a_model_of_ones_own(capsys):
    Path("mine.yaml").write_text(FOLDER)
    message = refusal(capsys, "fit", "--config", "mine.yaml", "--demo")
    assert "parts only, but `model` is TinyRetriever. Leave out `--demo`" in message


def test_tables_that_cannot_be_read(capsys):
    Path("mine.yaml").write_text(FOLDER)
    Path("clips.csv").write_text("filename,caption\na.wav," + "x" * 140_000)
    message = refusal(capsys, "fit", "--config", "mine.yaml")
    assert message.startswith(
        "clips.csv, line 2: a field is longer than 131072 characters. Look for a double quote"
    )
    message = refusal(capsys, "fit", "--config", "mine.yaml", "--data.encoding", "utf-99")
    assert message.startswith("Argument `encoding` has to be an encoding that Python knows")


def test_two_runs_in_one_folder(demo, capsys):
    given = ("fit", "--config", ASK, demo, "--run", "run", "--trainer.max_epochs")
    with started(Path("printed"), *given, 500) as process:
        wait_for(Path("run/logs/version_0/config.yaml"), process)
        message = refusal(capsys, *given, 1)
        assert message.startswith("Another run is writing to run at this moment. Wait for its end, or pass")
    # The lock of a process that was killed holds nobody up, and nothing stays behind.
    ask_lightning(*given, 1)
    assert not Path("run/.lock").exists()


def test_other_processes_of_a_run_take_no_lock(monkeypatch):
    with locked_run(Path("run")):
        for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "SLURM_PROCID"):
            with monkeypatch.context() as patched:
                patched.setenv(name, "1")
                with locked_run(Path("run")):
                    pass
        with pytest.raises(UsageError, match="Another run"), locked_run(Path("run")):
            pass
    assert not Path("run").exists(), "nothing was written"


def test_a_file_system_without_locks(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.warns(UserWarning, match="The file system of run has no locks"), locked_run(Path("run")):
        Path("run/file").touch()
    assert Path("run/file").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "a", "--text", "rain", "--raw", "--rerank", 5], "`--raw` sorts by cosine, so `--rerank`"),
        (["search", "a", "--text", "rain", "--lowest", "nan"], "`--lowest` has to be a number, but got nan"),
        (["inspect", "--config", ASK, "--monitor", "val/loss"], "so --monitor has no effect"),
        (["inspect", "--config", ASK, "--weights", "x"], "so --weights has no effect"),
        (
            ["fit", "--config", ASK, "DEMO", "--ask.compile_loss=true", "--trainer.strategy=ddp_spawn"],
            "`--ask.compile_loss true` has no effect under a strategy that sends a copy of the model",
        ),
    ],
)
def test_flags_that_could_not_have_an_effect(arguments, message, demo, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [demo if argument == "DEMO" else argument for argument in arguments]
    assert message in refusal(capsys, *given)


@pytest.mark.parametrize("command", ["encode", "predict"])
def test_data_without_an_order_are_not_encoded(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    message = refusal(capsys, command, "--model", "TinyRetriever", "--data", data)
    assert message.startswith("BoringDataModule does not say which clips are encoded in which order.")


def test_options_of_ask_for_a_baseline(demo, capsys):
    message = refusal(capsys, "fit", "--config", BASELINE, demo, "--ask.loss.num_neighbors", 3)
    assert message.startswith("--ask.loss.num_neighbors has no effect")
    assert message.endswith("Add `--config ask`, or the part of another loss.")
    given = ("--config", BASELINE, "--config", "ask", demo, "--trainer.max_epochs", 1)
    cli = ask_lightning("fit", *given, "--ask.loss.num_neighbors", 3)
    assert cli.model.loss.num_neighbors == 3


@pytest.mark.parametrize("command", ["validate", "test", "predict", "encode"])
def test_options_of_ask_where_nothing_is_trained(command, demo, capsys):
    message = refusal(capsys, command, "--config", ASK, demo, "--ask.loss.num_neighbors=3")
    assert message == (
        f"--ask.loss.num_neighbors has no effect, because `{command}` does not train. Leave it out."
    )


@pytest.mark.parametrize("flag", ["--return_predictions", "--weights_only"])
def test_options_of_predict_that_lightning_would_heed(flag, demo, capsys):
    message = refusal(capsys, "predict", "--config", ASK, demo, flag, "false")
    assert message == f"{flag} has no effect, because `predict` writes a file. Leave it out."


@pytest.mark.parametrize("command", ["encode", "predict", "test"])
def test_encoding_by_other_methods_than_those_of_training(command, demo, capsys):
    Path("mine.yaml").write_text(f"compose: [{ASK}]\nask: {{audio: embed_audio}}\n")
    message = refusal(capsys, command, "--config", "mine.yaml", demo)
    assert message.startswith(f"`{command}` encodes by 'encode_audio' and 'encode_text' of ResNet38BERT, but")
    assert "trains by `ask.audio: embed_audio` and `ask.text: null`" in message


@pytest.mark.parametrize(("there", "named"), [(["best", "last"], "last"), (["best"], "best")])
def test_a_run_is_not_mixed_with_another(there, named, demo, capsys):
    Path("run/checkpoints").mkdir(parents=True)
    for name in there:
        Path(f"run/checkpoints/{name}.ckpt").touch()
    message = refusal(capsys, "fit", "--config", ASK, "--run", "run")
    assert message.startswith("run/checkpoints holds the checkpoints of a run. Go on with it by ")
    assert f"`--ckpt_path {named}`" in message


def test_checkpoints_of_another_kind(demo, capsys):
    torch.save({"hyper_parameters": {"num_mels": 64}, "state_dict": {}}, "tiny.ckpt")
    message = refusal(capsys, "test", "--config", ASK, demo, "--ckpt_path", "tiny.ckpt")
    assert message.startswith(
        "tiny.ckpt is a checkpoint of another model than ask_lightning.models.ResNet38B"
    )
    Path("broken.ckpt").write_bytes(b"no checkpoint")
    message = refusal(capsys, "test", "--config", ASK, demo, "--ckpt_path", "broken.ckpt")
    assert message.startswith("broken.ckpt is no checkpoint that can be read")


def test_a_folder_that_cannot_be_written_to(demo, capsys):
    Path("file").touch()
    message = refusal(capsys, "fit", "--config", ASK, demo, "--run", "file/run")
    assert "file is no folder, or a read-only one" in message


@pytest.mark.parametrize(
    ("command", "flag", "path", "remedy"),
    [
        ("fit", "--run", "locked/run", "Pass a folder of your own as `--run`; the checkpoint of another run"),
        ("test", "--run", "locked", "goes by its path as `--ckpt_path`."),
        ("inspect", "--run", "locked", "Name a place for the picture by `--picture FILE`."),
        ("encode", "--output", "locked/a.safetensors", ""),
    ],
)
def test_a_folder_that_is_locked(command, flag, path, remedy, demo, capsys, monkeypatch):
    Path("locked").mkdir()
    Path("locked").chmod(0o500)
    may, locked = os.access, Path("locked").absolute()  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and may(path, mode))
    message = refusal(capsys, command, "--config", ASK, demo, flag, path)
    assert "locked is no folder, or a read-only one." in message
    assert remedy in message
    assert not list(Path("locked").iterdir())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_named(workers, tmp_path, capsys):
    root = write_demo_data(tmp_path) / "AudioCaps"
    for file in root.glob("audio/train/*.wav"):
        file.write_bytes(b"no audio")
    message = refusal(
        capsys,
        "fit",
        "--config",
        ASK,
        f"--demo={tmp_path}",
        "--data.check",
        "none",
        "--data.num_workers",
        workers,
    )
    assert "not an audio file that soundfile can read" in message
    assert "Traceback" not in message


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(demo, monkeypatch):
    def broken(*_):
        return 1 / 0

    monkeypatch.setattr("ask_lightning.models.ResNet38BERT.encode_audio", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit", "--config", ASK, demo])


def test_the_traceback_of_a_mistake_is_there_if_asked_for(monkeypatch):
    monkeypatch.setenv("ASK_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(UsageError):
        main(["fit", "--config", "nope"])


def test_help_names_commands_and_configs(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert "transfer" in out
    assert "my_recordings" in out
    assert re.search(r"DATASET +audiocaps, clotho, recordings ", out)
    assert re.search(r"LOSS +baseline, ask, .*triplet", out)
    assert re.search(r"KNOWLEDGE +enriched, wavcaps \(after ask, ", out)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ask-lightning {ask_lightning_package.__version__}\n"


def test_help_of_transfer(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", "--help"])
    assert stopped.value.code == 0
    assert "--target {audiocaps,clotho}" in capsys.readouterr().out


def test_ctrl_c_while_the_library_is_imported():
    """Torch takes seconds."""
    code = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *rest, **options):\n"
        "    if name == 'torch': raise KeyboardInterrupt\n"
        "    return real(name, *rest, **options)\n"
        "builtins.__import__ = interrupted\n"
        "from ask_lightning.cli import main\n"
        f"sys.exit(main(['fit', '--config', {ASK!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "ask-lightning: fit was ended by Ctrl-C.\n")


def test_as_a_process_of_its_own():
    with started(Path("printed"), "fit", "--config", "nope") as process:
        process.join(60)
    assert process.exitcode == 2
    (line,) = Path("printed").read_text().splitlines()
    assert line.startswith("ask-lightning: error: There is no config 'nope'.")


def test_importing_the_library_stays_light():
    """Beside what Lightning and torchmetrics import by themselves."""
    code = (
        "import sys, lightning.pytorch, torchmetrics.retrieval; before = set(sys.modules)\n"
        "import ask_lightning\n"
        "heavy = {'jsonargparse', 'wandb', 'matplotlib', 'transformers', 'torchaudio', 'tensorboard'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("val.csv", "demo/AudioCaps, only of train, test. Put the file beside the others"),
        ("train.csv", "There are no annotations of train in "),
    ],
)
def test_fit_names_the_split_whose_captions_are_missing(lost, message, tmp_path, capsys):
    write_demo_data(tmp_path / "demo")
    (tmp_path / "demo" / "AudioCaps" / lost).unlink()
    given = ("fit", "--config", "audiocaps_tiny_ask", "--datasets", tmp_path / "demo", "--data.seconds", 0.5)
    assert message in refusal(capsys, *given)
