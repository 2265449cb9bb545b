"""The paper's rows train, write a checkpoint and are tested, on synthetic data."""

import inspect
import math
from itertools import product
from pathlib import Path

import pytest
import torch

from ask_lightning import ASKModule, KnowledgeRefreshCallback
from ask_lightning.cli.compose import CONFIGS, compose, shipped_configs, shipped_roles
from ask_lightning.models import CEDSonar, ResNet38BERT
from tests.helpers.command_line import ask_lightning, logged

DATASETS, BACKBONES = ("audiocaps", "clotho"), ("resnet38_bert", "ced_sonar")
METHODS = ("baseline", "ask", "ask_wavcaps", "ask_enriched")
ROWS = ["_".join(row) for row in product(DATASETS, BACKBONES, METHODS)]
# Figure 3 and Table 4: similarity of tokens.
LOCAL = ("resnet38_bert_gpa", "resnet38_bert_flam")
LOCAL_ROWS = ["_".join(row) for row in product(DATASETS, LOCAL, METHODS)]
PLACES = {"run": "runs/x", "datasets": "data", "weights": "weights"}


def test_every_row_of_table_1_is_shipped():
    assert set(ROWS) <= set(shipped_configs())


def test_every_row_with_similarity_of_tokens_is_shipped():
    assert set(LOCAL_ROWS) <= set(shipped_configs())
    assert "clotho_resnet38_bert_gpa_teacher" in shipped_configs()
    refusing = ("triplet", "sigmoid", "momentum_contrast", "mined_negatives")
    assert not {f"clotho_{model}_{loss}" for model in LOCAL for loss in refusing} & set(shipped_configs())


# Every part is in one of them.
FEW = (
    "audiocaps_resnet38_bert_ask_wavcaps",
    "clotho_ced_sonar_ask_enriched",
    "clotho_resnet38_bert_baseline",
    "audiocaps_resnet38_bert_gpa_ask",
    "clotho_resnet38_bert_flam_baseline",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in ROWS + LOCAL_ROWS],
)
def test_every_config_trains_and_is_tested(name, demo, tmp_path):
    with_ask = "ask" in name
    # Drift is measured from the second refresh on.
    epochs = 2 if with_ask else 1
    cli = ask_lightning("fit", "--config", name, demo, "--run", "run", "--trainer.max_epochs", epochs)
    assert isinstance(cli.model, ASKModule) == with_ask
    assert type(cli.trainer.lightning_module if not with_ask else cli.model.model) is (
        ResNet38BERT if "resnet" in name else CEDSonar
    )
    curves = logged(Path("run"))
    losses = curves["ask/loss"] if with_ask else curves["train/loss_step"]
    assert len(losses) >= 3 * epochs
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    assert with_ask == ("ask/rdm_audio" in curves) == ("ask/obi_fine" in curves)
    if with_ask:
        (refresh,) = [one for one in cli.trainer.callbacks if isinstance(one, KnowledgeRefreshCallback)]
        source = refresh.source()
        assert ("WavCaps" in type(source).__name__) == ("wavcaps" in name)
        enriched = [clip for clip in source.clips if "in which one hears" in clip.captions[0]]
        assert len(enriched) == (len(source.clips) if "enriched" in name else 0)
    assert {path.name for path in Path("run/checkpoints").glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    trained = cli.model.model if with_ask else cli.model
    if any(word in name for word in ("gpa", "flam")):
        assert trained.test_metrics.interaction is trained.interaction is not None
        assert not with_ask or cli.model.loss.interaction == "interaction"
    tested = ask_lightning("test", "--config", name, demo, "--run", "run", "--ckpt_path", "best")
    assert 0 <= tested.trainer.callback_metrics["test/mean_recall"] <= 1
    assert "test/a2t/recall_at_1" in logged(Path("run"))


@pytest.mark.parametrize(("dataset", "backbone"), list(product(DATASETS, BACKBONES + LOCAL)))
def test_the_rows_of_a_comparison_differ_in_ask_alone(dataset, backbone):
    baseline, *others = (
        compose([f"{dataset}_{backbone}_{method}"], PLACES).config | {} for method in METHODS
    )
    assert "ask" not in baseline
    knowledge = ("knowledge", "enriched")
    for config in others:
        assert config["ask"]["enabled"]
        for name in knowledge:
            config["data"]["init_args"].pop(name, None)
        assert {name: part for name, part in config.items() if name != "ask"} == baseline


def test_the_schedules_are_the_papers():
    for dataset, batch_size in (("audiocaps", 32), ("clotho", 24)):
        act = compose([f"{dataset}_resnet38_bert_ask"], PLACES).config
        assert act["data"]["init_args"]["batch_size"] == batch_size
        assert (act["trainer"]["max_epochs"], act["trainer"]["gradient_clip_val"]) == (50, 2.0)
        options = act["model"]["init_args"]
        assert (options["learning_rate"], options["decay_epochs"], options["decay_factor"]) == (5e-5, 20, 0.1)
        assert act["ask"] == {
            "enabled": True,
            "loss": {
                "class_path": "ask_lightning.losses.ReliabilityOTLoss",
                "init_args": {
                    "num_neighbors": 10,
                    "injection_ratio": 0.2,
                    "ot_factor": 0.2,
                    "lambda_fine": 0.2,
                    "lambda_coarse": 0.3,
                },
            },
            "refresh": {"T": 15, "num_prototypes": 512, "normalize_prototypes": True},
        }
        clap = compose([f"{dataset}_ced_sonar_ask"], PLACES).config
        assert clap["trainer"]["max_epochs"] == 10
        assert clap["model"]["init_args"]["decay_epochs"] == 4


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_rows_hear_and_read_what_their_baseline_does(dataset, method):
    """The public code of ML-ACT (13c21d9) and of ML-CLAP (154393e).

    Both rewrite captions and encode padding like sound. ML-ACT masks spectrograms, and its train() keeps the
    epoch with the highest R@1 + R@5 + R@10 from text to audio; ML-CLAP's SONAR is fairseq2's, with dropout
    behind the activation.
    """
    act, clap = (compose([f"{dataset}_{backbone}_{method}"], PLACES).config for backbone in BACKBONES)
    for config, monitor in ((act, "val/t2a/mean_recall"), (clap, "val/mean_recall")):
        assert config["data"]["init_args"]["caption_style"] == "plain"
        assert config["model"]["init_args"]["padding"] == "heard"
        assert config["trainer"]["callbacks"][2]["init_args"]["monitor"] == monitor
    assert "spec_augment" not in act["model"]["init_args"] | clap["model"]["init_args"]
    assert inspect.signature(ResNet38BERT).parameters["spec_augment"].default is True
    assert inspect.signature(CEDSonar).parameters["spec_augment"].default is False
    assert clap["model"]["init_args"]["activation_dropout"] == 0.1
    other = compose([f"{dataset}_clap_{method}"], PLACES).config
    assert "caption_style" not in other["data"]["init_args"]


@pytest.mark.parametrize("method", ["baseline", "ask"])
def test_ml_claps_own_loss_is_a_part(method, demo):
    cli = ask_lightning(
        *("fit", "--config", f"clotho_ced_sonar_{method}", "--config", "ml_clap", demo),
        *("--run", "run", "--trainer.max_epochs", 1),
    )
    model = cli.model.model if method == "ask" else cli.model
    assert isinstance(model.temperature, torch.nn.Parameter)
    assert model.temperature.item() != pytest.approx(0.07, abs=1e-6), "it is trained"
    assert logged(Path("run"))["train/temperature"]
    if method == "ask":
        assert cli.model.ask_step == "criterion", "the regulariser stays"
        assert cli.model.loss.temperature is model.temperature
    tested = ask_lightning(
        *("test", "--config", f"clotho_ced_sonar_{method}", "--config", "ml_clap", demo),
        *("--run", "run", "--ckpt_path", "best"),
    )
    assert tested.model.temperature.item() == pytest.approx(model.temperature.item())


def test_every_part_that_reads_files_is_shrunken_by_the_demo():
    roles = shipped_roles()
    for part in ("run", *roles.datasets, *roles.models, *roles.of_sources, "teacher"):
        # A part that is composed of another one is shrunken with it.
        parts = compose([part], PLACES).parts
        assert any((CONFIGS / "demo" / f"{one}.yaml").is_file() for one in parts), part
