"""Configs are merged in order, and what is wrong with one is said in a sentence."""

import pytest

from ask_lightning.cli.compose import compose
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.run_options import RunOptions

PLACES = {"run": "runs/x", "datasets": "/data", "weights": "/weights"}


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_config_of_ones_own_is_laid_over_a_shipped_one(tmp_path):
    own = write(
        tmp_path / "mine.yaml",
        "compose: [clotho_ced_sonar_ask]\n"
        "ask: {loss: {init_args: {num_neighbors: 5}}}\n"
        "trainer: {max_epochs: 3}\n",
    )
    made = compose([own], PLACES)
    assert made.parts == ["run", "clotho", "ced_sonar", "ask"]
    assert made.config["ask"]["loss"]["init_args"]["num_neighbors"] == 5
    assert made.config["ask"]["loss"]["init_args"]["injection_ratio"] == 0.2
    assert made.config["trainer"]["max_epochs"] == 3
    assert made.config["data"]["init_args"]["root"] == "/data/Clotho"


def test_paths_are_relative_to_the_file_that_names_them(tmp_path):
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "a.yaml", "trainer: {max_epochs: 1}\n")
    own = write(tmp_path / "mine.yaml", "compose: [parts/a.yaml]\n")
    assert compose([own], PLACES).config == {"trainer": {"max_epochs": 1}}


def test_lists_are_replaced_or_appended_to(tmp_path):
    first = write(tmp_path / "a.yaml", "trainer: {callbacks: [1], logger: {class_path: A}}\n")
    more = write(tmp_path / "b.yaml", "trainer: {callbacks+: [2], logger+: [3]}\n")
    other = write(tmp_path / "c.yaml", "trainer: {callbacks: [4]}\n")
    assert compose([first, more], PLACES).config["trainer"] == {
        "callbacks": [1, 2],
        "logger": [{"class_path": "A"}, 3],
    }
    assert compose([first, more, other], PLACES).config["trainer"]["callbacks"] == [4]


def test_another_class_forgets_the_arguments_of_the_class_before(tmp_path):
    own = write(tmp_path / "a.yaml", "model: {class_path: my.Model, init_args: {size: 3}}\n")
    made = compose(["clotho_ced_sonar_ask", own], PLACES)
    assert made.config["model"] == {"class_path": "my.Model", "init_args": {"size": 3}}


@pytest.mark.parametrize(
    ("section", "enabled"), [("ask: null", False), ("ask: {}", True), ("ask: {enabled: false}", False)]
)
def test_a_section_ask_switches_ask_on_and_an_empty_one_off(tmp_path, section, enabled):
    own = write(tmp_path / "a.yaml", f"compose: [clotho_ced_sonar_ask]\n{section}\n")
    assert compose([own], PLACES).config["ask"]["enabled"] is enabled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML that can be read"),
        ("- 1", "has to hold sections such as `model:`, but holds a list"),
        ("compose: run", "`compose` has to be a list of names and paths, but got 'run'"),
        ("compose: [mine.yaml]", "is made of itself"),
        ("compose: [nothere]", "There is no config 'nothere'. Shipped are DATASET_MODEL_LOSS and DATASET_"),
        ("compose: [nothere.yaml]", r"There is no config file .*nothere.yaml' \(named in .*mine.yaml\)"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, text, message):
    own = write(tmp_path / "mine.yaml", text)
    with pytest.raises(UsageError, match=message):
        compose([own], PLACES)


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is no YAML that can be read"):
        compose([str(tmp_path / "mine.yaml")], PLACES)


def test_shipped_configs_are_found_by_their_names_in_the_repository_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"run": "runs/1", "datasets": "data", "weights": "weights"}
    shipped = compose(["clotho_ced_sonar_ask"], places).config
    for name in ("clotho_ced_sonar_ask.yaml", "configs/clotho_ced_sonar_ask.yaml"):
        assert compose([name], places).config == shipped
    (tmp_path / "clotho_ced_sonar_ask.yaml").write_text("seed_everything: 3")
    assert compose(["clotho_ced_sonar_ask.yaml"], places).config == {"seed_everything": 3}
    with pytest.raises(UsageError, match=r"There is no config file 'other/clotho_ced_sonar_ask\.yaml'"):
        compose(["other/clotho_ced_sonar_ask.yaml"], places)


def monitors(config):
    callbacks = config["trainer"]["callbacks"]
    given = [
        callback["init_args"]["monitor"]
        for callback in callbacks
        if "monitor" in callback.get("init_args", {})
    ]
    assert "monitor" not in config, "it is no section"
    return given


def test_the_best_epoch_is_chosen_by_the_metric_that_is_named_last(tmp_path):
    own = write(tmp_path / "mine.yaml", "compose: [clotho_resnet38_bert_ask]\nmonitor: val/a2t/mean_recall\n")
    assert monitors(compose(["clotho_clap_ask"], PLACES).config) == ["val/mean_recall"] * 2
    assert monitors(compose([own], PLACES).config) == ["val/a2t/mean_recall"] * 2
    options = RunOptions.parse(["--config", own, "--monitor", "val/t2a/recall_at_1"])
    assert options.lightning_arguments == []
    assert monitors(options.compose().config) == ["val/t2a/recall_at_1"] * 2


def test_a_monitor_without_effect_or_without_a_name(tmp_path):
    own = write(tmp_path / "mine.yaml", "trainer: {max_epochs: 1}\n")
    with pytest.raises(
        UsageError, match=r"--monitor has no effect, because nothing in the config says \{monitor\}"
    ):
        RunOptions.parse(["--config", own, "--monitor", "val/loss"]).compose()
    own = write(tmp_path / "mine.yaml", "compose: [run]\nmonitor: [val/loss]\n")
    with pytest.raises(UsageError, match=r"`monitor` has to be the name of a metric, but got \['val/loss'\]"):
        compose([own], PLACES)
