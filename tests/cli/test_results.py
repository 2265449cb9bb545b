"""What a test leaves in the folder of its run."""

import json
import shlex
from importlib.metadata import version

import pytest

from ask_lightning.cli.results import public_results, read_results
from ask_lightning.models import ResNet38BERT
from ask_lightning.utilities.weights import weights_fingerprint
from tests.helpers.command_line import ASK, ask_lightning, last_checkpoint


@pytest.fixture(scope="module")
def tested(demo, trained, tmp_path_factory):
    """A test in a folder of its own: the command, the CLI after it and the results."""
    run = tmp_path_factory.mktemp("tested")
    checkpoint = last_checkpoint(trained)
    arguments = ["test", "--config", ASK, demo, "--run", run, "--ckpt_path", checkpoint]
    return arguments, ask_lightning(*arguments), json.loads((run / "results.json").read_text())


def test_both_searches_are_in_the_results(tested):
    _, cli, results = tested
    logged = cli.trainer.callback_metrics
    assert len(results["metrics"]["raw"]) == len(results["metrics"]["calibrated"]) >= 10
    for name, value in results["metrics"]["raw"].items():
        assert value == pytest.approx(float(logged[f"test/{name}"]))
    for name, value in results["metrics"]["calibrated"].items():
        assert value == pytest.approx(float(logged[f"test/calibrated/{name}"]))
    assert results["calibration"] == dict(cli.trainer.calibration.parameters)


def test_the_protocol_and_the_weights_are_in_the_results(tested, trained):
    arguments, _, results = tested
    assert shlex.split(results["command"]) == ["ask-lightning", *map(str, arguments)]
    protocol = results["protocol"]
    assert (protocol["dataset"], protocol["split"]) == ("AudioCaps", "test")
    assert (protocol["clips"], protocol["captions"], protocol["limited_to_batches"]) == (6, 30, None)
    assert protocol["caption_style"] == "plain"
    assert "ranks ahead" in protocol["ties"]
    model = ResNet38BERT.load_from_checkpoint(last_checkpoint(trained), map_location="cpu")
    assert results["model"]["fingerprint"] == weights_fingerprint(model)
    assert results["model"]["checkpoint"] == str(last_checkpoint(trained))
    assert results["versions"]["torch"] == version("torch")


def test_a_part_of_a_split_is_said_to_be_one(demo, trained):
    ask_lightning(
        *("test", "--config", ASK, demo, "--run", "part", "--ckpt_path", last_checkpoint(trained)),
        *("--trainer.limit_test_batches", 1, "--calibrate", "false", "--data.exclude", "['Y1']"),
    )
    with open("part/results.json") as file:
        results = json.load(file)
    assert results["protocol"]["limited_to_batches"] == 1
    assert results["protocol"]["excluded_from_training"] == ["Y1"]
    assert results["metrics"]["calibrated"] is None
    assert results["calibration"] is None


def test_public_results_name_no_folder(tested, trained):
    _, _, results = tested
    results["protocol"]["excluded_from_training"] = "/home/me/list.txt"
    text = json.dumps(public_results(results))
    assert "/home/me" not in text
    assert str(trained) not in text
    assert "list.txt" in text


def test_another_file_is_no_results(tmp_path):
    assert read_results(tmp_path / "results.json") is None
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "results.json").write_text(text)
        assert read_results(tmp_path / "results.json") is None
