"""A run as a folder that loads without it, its model card, and what cannot be exported."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.models import ResNet38BERT, from_pretrained, load_calibration, save_pretrained
from ask_lightning.utilities.weights import weights_fingerprint
from tests.helpers.command_line import ASK, ask_lightning, last_checkpoint, refusal

EXPORTED = ["README.md", "calibration.safetensors", "config.json", "model.safetensors", "results.json"]
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def run(demo, trained, tmp_path_factory):
    """A run whose best epoch has been tested."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trained, folder)
    ask_lightning("test", "--config", ASK, demo, "--run", folder, "--ckpt_path", "best")
    return folder


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_a_run_is_exported_with_its_results(run, demo, tmp_path):
    folder = ask_lightning("export", run, "--output", tmp_path / "model")
    assert sorted(file.name for file in folder.iterdir()) == EXPORTED
    best = ResNet38BERT.load_from_checkpoint(run / "checkpoints" / "best.ckpt", map_location="cpu")
    for loaded in (from_pretrained(folder), ResNet38BERT.from_pretrained(folder)):
        assert weights_fingerprint(loaded) == weights_fingerprint(best)
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == json.loads((run / "results.json").read_text())["metrics"]

    card = (folder / "README.md").read_text()
    head = head_of(card)
    assert head["library_name"] == "ask-lightning"
    assert head["datasets"] == ["audiocaps"]
    assert "audio-text-retrieval" in head["tags"]
    (entry,) = head["model-index"][0]["results"]
    scores = {metric["name"]: metric["value"] for metric in entry["metrics"]}
    assert scores["A2T R@1, by cosine"] == pytest.approx(
        100 * results["metrics"]["raw"]["a2t/recall_at_1"], abs=1e-3
    )
    assert scores["T2A mAP@10, calibrated"] == pytest.approx(
        100 * results["metrics"]["calibrated"]["t2a/map_at_10"], abs=1e-3
    )
    for said in ("| loss | ReliabilityOTLoss |", "(6 clips, 30 captions)", "plain_caption", "at 32000 Hz"):
        assert said in card
    for file in folder.glob("*.[jm][sd]*"):
        for private in (str(run), demo.removeprefix("--demo="), str(tmp_path)):
            assert private not in file.read_text()


def test_the_code_of_the_card_runs(run, tmp_path, monkeypatch):
    ask_lightning("export", run, "--output", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "model" / "README.md").read_text().split("```python")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert names["similarity"].shape == (1, 1)
    bias = names["hubs"].audio_bias
    torch.testing.assert_close(names["calibrated"], names["similarity"] - bias.to(names["similarity"]))


def test_all_tests_of_a_run_are_in_the_card(run, demo, tmp_path):
    several = tmp_path / "run"
    shutil.copytree(run, several)
    given = ("--config", ASK, demo, "--run", several, "--ckpt_path", "best")
    ask_lightning("test", *given, "--trainer.limit_test_batches", 1, "--calibrate", "false")
    # A repeated test counts once.
    ask_lightning("test", *given, "--trainer.limit_test_batches", 1, "--calibrate", "false")
    folder = ask_lightning("export", several, "--output", tmp_path / "model")
    assert sorted(path.name for path in folder.glob("results*")) == ["results-2.json", "results.json"]
    latest, first = (json.loads((folder / name).read_text()) for name in ("results.json", "results-2.json"))
    assert latest["protocol"]["limited_to_batches"] == 1
    assert first["metrics"] == json.loads((run / "results.json").read_text())["metrics"]
    card = (folder / "README.md").read_text()
    assert card.count("On the test split of AudioCaps") == 2
    assert "Only the first 1 batches were tested: no result to report." in card
    assert card.count("chosen on the validation split") == 1
    assert card.count("A2T is audio-to-text") == 1
    (entry,) = head_of(card)["model-index"][0]["results"]
    assert len(entry["metrics"]) == len({metric["name"] for metric in entry["metrics"]})
    only = ask_lightning(
        *("export", several, "--output", tmp_path / "one", "--results", run / "results.json"),
    )
    assert [path.name for path in only.glob("results*")] == ["results.json"]


def test_the_calibration_travels_with_the_model(run, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ("--config", ASK, demo, "--run", run, "--ckpt_path", "best")
    folder = ask_lightning("export", run, "--output", "model")
    bank, calibration = load_calibration(folder)
    chosen = json.loads((run / "results.json").read_text())["calibration"]
    assert calibration.parameters == chosen
    ask_lightning("encode", *given, "--split", "train", "--output", "train.safetensors")
    training = EncodedPairs.load(Path("train.safetensors"))
    torch.testing.assert_close(bank.text, training.text, atol=1e-3, rtol=0)
    assert bank.audio.shape == training.audio.shape

    ask_lightning("encode", *given, "--output", "plain.safetensors")
    ask_lightning("encode", *given, "--output", "calibrated.safetensors", "--calibrate", "true")
    for query in (("--text", "rain"), ("--text", "a dog barks")):
        by_file = ask_lightning("search", "calibrated.safetensors", *query)
        by_model = ask_lightning("search", "plain.safetensors", *query, "--ckpt_path", folder)
        assert [hit.row for hit in by_model] == [hit.row for hit in by_file]
        for one, two in zip(by_model, by_file, strict=True):
            assert one.score == pytest.approx(two.score, abs=1e-3)
            assert one.score != one.cosine
        raw = ask_lightning("search", "plain.safetensors", *query, "--ckpt_path", folder, "--raw")
        assert raw == ask_lightning("search", "plain.safetensors", *query)
    model = from_pretrained(folder)
    next(iter(model.parameters())).data.view(-1)[0] += 1
    save_pretrained(model, Path("other"))
    message = refusal(capsys, "search", "plain.safetensors", "--text", "rain", "--ckpt_path", "other")
    assert message.startswith("other holds other weights than those that encoded the file")

    # The calibration of other weights stays where it is.
    shutil.copytree(run, "retrained")
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"]["audio_head.0.bias"] += 1
    torch.save(content, Path("retrained/checkpoints/best.ckpt"))
    without = ask_lightning("export", "retrained", "--output", "without")
    assert load_calibration(without) is None
    assert "load_calibration" not in (without / "README.md").read_text()


def test_results_of_other_weights_are_left_out(run, tmp_path, capsys):
    last = tmp_path / "other" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    content = torch.load(last_checkpoint(run), weights_only=True)
    content["state_dict"]["audio_head.0.bias"] += 1
    torch.save(content, last)
    for name in ("logs", "results.json"):
        copy = shutil.copytree if name == "logs" else shutil.copy
        copy(run / name, last.parent.parent / name)
    folder = ask_lightning("export", last, "--output", tmp_path / "model")
    assert "There are no results of a test of this checkpoint" in capsys.readouterr().err
    assert not (folder / "results.json").exists()
    card = (folder / "README.md").read_text()
    assert "This checkpoint has not been tested." in card
    assert "model-index" not in head_of(card)
    message = refusal(
        capsys, "export", last, "--output", tmp_path / "more", "--results", run / "results.json"
    )
    assert "holds the results of other weights" in message


def test_a_bare_checkpoint_needs_its_class(run, tmp_path, capsys):
    shutil.copy(last_checkpoint(run), tmp_path / "bare.ckpt")
    arguments = ["export", tmp_path / "bare.ckpt", "--output", tmp_path / "model"]
    assert "Pass it by `--class`" in refusal(capsys, *arguments)
    assert "There is no class 'nowhere.Model'" in refusal(capsys, *arguments, "--class", "nowhere.Model")
    assert "pathlib.Path is no LightningModule" in refusal(capsys, *arguments, "--class", "pathlib.Path")
    message = refusal(capsys, *arguments, "--class", "ask_lightning.models.CEDSonar")
    assert "is no checkpoint of ask_lightning.models.CEDSonar" in message
    folder = ask_lightning(*arguments, "--class", "ask_lightning.models.ResNet38BERT")
    assert "The config of the training is not known" in (folder / "README.md").read_text()


OWN = """
import lightning as L
import torch

class Saved(L.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.table = torch.nn.Embedding(5, width)

class Unsaved(L.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.table = torch.nn.Embedding(5, width)
"""


def test_a_model_of_the_users_own_is_exported(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    content = {"hyper_parameters": {"width": 3}, "pytorch-lightning_version": "2.5.0"}
    torch.save(content | {"state_dict": {"table.weight": torch.ones(5, 3)}}, tmp_path / "own.ckpt")
    arguments = ["export", tmp_path / "own.ckpt", "--output", tmp_path / "model", "--class"]
    message = refusal(capsys, *arguments, "own_model.Unsaved")
    assert "Unsaved could not be loaded from what would be its folder" in message
    assert "save_hyperparameters()" in message
    assert not [path for path in tmp_path.glob("*model*") if path.is_dir()]
    folder = ask_lightning(*arguments, "own_model.Saved")
    assert torch.equal(from_pretrained(folder).table.weight, torch.ones(5, 3))
    card = (folder / "README.md").read_text()
    assert "The module `own_model`, which defines the class, has to be importable." in card


def test_a_folder_that_another_process_writes_meanwhile(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "model"

    def save(model, folder):
        save_pretrained(model, folder)
        output.mkdir()
        (output / "theirs").touch()

    monkeypatch.setattr("ask_lightning.cli.export.save_pretrained", save)
    message = refusal(capsys, "export", run, "--output", output)
    assert message.startswith(f"{output} has been written by another process meanwhile, and stays as it is.")
    assert [file.name for file in output.iterdir()] == ["theirs"]


def test_a_link_to_an_empty_folder(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    ask_lightning("export", run, "--output", tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()


def test_folders_that_cannot_be_used_are_refused(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "and not empty" in refusal(capsys, "export", run, "--output", tmp_path / "full")
    assert "There is no run and no checkpoint" in refusal(capsys, "export", "nowhere", "--output", "model")
    assert "holds no checkpoints/best.ckpt" in refusal(capsys, "export", tmp_path, "--output", "model")
    assert "--output" in refusal(capsys, "export", run)
    assert "Pass that too" in refusal(capsys, "export", run, "--output", "model", "--private")
    (tmp_path / "damaged.ckpt").write_bytes(b"nothing")
    message = refusal(
        capsys,
        "export",
        tmp_path / "damaged.ckpt",
        "--output",
        "model",
        "--class",
        "ask_lightning.models.CEDSonar",
    )
    assert "or is damaged" in message
    assert not list(tmp_path.glob("model*"))


class FakeHub:
    """What `huggingface_hub.HfApi` is asked for."""

    calls: list

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error = [], error

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_a_model_is_pushed(run, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    ask_lightning("export", run, "--output", tmp_path / "model", "--push", "me/sounds", "--private")
    assert hub.calls == [
        ("create", "me/sounds", True, True),
        ("upload", "me/sounds", EXPORTED),
    ]
    card = (tmp_path / "model" / "README.md").read_text()
    assert 'from_pretrained("me/sounds")' in card
    assert head_of(card)["model-index"][0]["name"] == "sounds"


def test_a_push_that_fails_leaves_the_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(OSError("401 Unauthorized")))
    message = refusal(capsys, "export", run, "--output", tmp_path / "model", "--push", "me/sounds")
    assert "was not uploaded to 'me/sounds' (401 Unauthorized)" in message
    assert "hf auth login" in message
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_config_of_which_a_full_disk_has_left_a_part_is_left_out(run, demo, tmp_path, monkeypatch, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    before = set(copied.rglob("*"))

    def write_half(parser, config, path, **_):
        Path(path).write_text("trainer:\n  callbacks: [")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("lightning.pytorch.cli.LightningArgumentParser.save", write_half)
        refusal(capsys, "validate", "--config", ASK, demo, "--run", copied, "--ckpt_path", "best")
    assert not [path for path in set(copied.rglob("*")) - before if path.name == "config.yaml"]
    # Versions of this library that wrote it in place have left such a one.
    half = copied / "logs" / "version_9" / "config.yaml"
    half.parent.mkdir()
    half.write_text("trainer:\n  callbacks: [")
    ask_lightning("export", copied, "--output", tmp_path / "model")
    assert "config.yaml is damaged and left out." in capsys.readouterr().err
    assert "| loss | ReliabilityOTLoss |" in (tmp_path / "model" / "README.md").read_text()
