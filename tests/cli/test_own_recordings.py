"""One's own recordings: names of configs, columns that are found, flags that do not exist."""

import json
import subprocess
import sys

import pytest

from ask_lightning.cli import check, run
from ask_lightning.cli.compose import compose, shipped_configs, shipped_roles
from ask_lightning.cli.errors import UsageError
from ask_lightning.data import FolderData, write_recordings

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


def test_a_wrong_flag_is_refused_without_lightning():
    code = (
        "import sys; from ask_lightning.cli import main;"
        "main(['fit', '--config', 'clap_ask', '--data.rot', 'x']);"
        "main(['--help']); assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
