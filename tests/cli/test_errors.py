"""Errors are told apart by their class and by the phase in which they arise, not by their wording."""

import io
import re
import sys
from argparse import ArgumentError

import pytest
import torch
from torch._utils import ExceptionWrapper

from ask_lightning.cli import main
from ask_lightning.cli.errors import UsageError, construct, explain, usage_errors
from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.knowledge.snapshot_file import SnapshotError
from ask_lightning.models import ResNet38BERT
from tests.helpers.command_line import ASK, ask_lightning, refusal


class Broken(torch.nn.Module):
    """A model whose constructor has a bug."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 1 / 0


def through_worker(error: Exception) -> Exception:
    """An error as the process with the training loop gets it from a process that loads data."""
    try:
        raise error
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(type(error)) as caught:
        wrapper.reraise()
    return caught.value


@pytest.mark.parametrize("kind", [AudioFileError, FileNotFoundError, ImportError, SnapshotError, UsageError])
def test_some_classes_are_explained_at_any_time(kind):
    assert explain(kind("There is\n  no such file.")) == "There is no such file."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a.csv"), "[Errno 28] No space left on device: 'a.csv'."),
        (OSError(122, "Disk quota exceeded"), "[Errno 122] Disk quota exceeded."),
        (OSError(27, "File too large", "a.csv"), "[Errno 27] File too large: 'a.csv'."),
        (UsageError("a.bin cannot be written: (os error 28)"), "a.bin cannot be written: (os error 28)."),
    ],
)
def test_what_to_do_about_a_full_disk(error, said):
    assert explain(error) == f"{said} Free space there, or write to another disk. What is complete stays."


def test_arguments_of_a_message_are_named_as_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught, usage_errors():
        construct(ResNet38BERT, audio_weights="missing.pth", text_weights=None, tokenizer="hashed")
    assert "`audio_weights` names weights that are not there" in str(caught.value)
    assert str(caught.value).endswith("Random weights have to be asked for: `--model.audio_weights null`.")


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError, ZeroDivisionError])
def test_others_keep_their_traceback(kind):
    assert explain(kind("Argument `x` has to be positive.")) is None


@pytest.mark.parametrize("kind", [AudioFileError, FileNotFoundError])
def test_an_error_of_a_worker_is_told_without_the_workers_traceback(kind):
    error = through_worker(kind("a.wav: the file is damaged: no header."))
    assert "Traceback" in str(error)
    assert explain(error) == "a.wav: the file is damaged: no header."


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, OSError])
def test_checks_in_the_setup_are_errors_of_usage(kind):
    with pytest.raises(UsageError, match=re.escape("Argument `x` has to be 1.")) as caught, usage_errors():
        raise kind("Argument `x` has to be 1.")
    assert isinstance(caught.value.__cause__, kind)


def test_bugs_in_the_setup_keep_their_traceback():
    with pytest.raises(KeyError), usage_errors():
        raise KeyError("x")


def test_after_the_setup_errors_pass_unchanged():
    with pytest.raises(ValueError, match="wrong"), usage_errors(is_setup=lambda: False):
        raise ValueError("wrong")


def construct_as_jsonargparse(kind: type, *arguments: object) -> None:
    try:
        construct(kind, *arguments)
    except Exception as error:
        raise ValueError("Does not validate against any of the Union subtypes") from error


def test_what_a_constructor_raises_passes_jsonargparse_unchanged():
    with pytest.raises(UsageError, match="invalid literal"), usage_errors():
        construct_as_jsonargparse(int, "x")
    with pytest.raises(ZeroDivisionError), usage_errors():
        construct_as_jsonargparse(Broken)


def test_the_parsers_reason_is_that_of_the_class_that_was_named():
    option = ArgumentError(None, "Option 'foo' is not accepted")
    named = ValueError("Problem with given class_path 'my.Model':\n  Option 'foo' is not accepted")
    named.__cause__ = option
    whole = ArgumentError(None, f"Parser key:\n  Errors:\n  - {named}\n  - Expected a <class 'NoneType'>")
    whole.__cause__ = named
    with pytest.raises(UsageError) as caught, usage_errors():
        raise whole
    assert str(caught.value) == "Problem with given class_path 'my.Model': Option 'foo' is not accepted"


def test_a_bug_in_a_model_keeps_its_traceback(demo, monkeypatch):
    monkeypatch.setattr("ask_lightning.models.ResNet38BERT.add_heads", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask_lightning("fit", "--config", ASK, demo)


def test_a_wrong_shape_in_training_keeps_its_traceback(demo, monkeypatch):
    def broken(*_):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr("ask_lightning.models.ResNet38BERT.validation_step", broken)
    with pytest.raises(ValueError, match="shapes do not fit"):
        ask_lightning("fit", "--config", ASK, demo)


def test_training_data_are_set_up_after_the_sanity_check(demo, capsys):
    message = refusal(capsys, "fit", "--config", ASK, demo, "--data.batch_size", 200)
    assert "do not fill a batch of 200" in message


def test_what_a_terminal_cannot_show_is_written_in_another_way(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert main(["--help"]) == 0
    sys.stdout.flush()
    assert rb"audio\u2013text" in output.getvalue()
