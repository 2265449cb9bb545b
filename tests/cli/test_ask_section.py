"""The loss of a run: by the name of a config, by flags, of the user's own; and what of ASK goes with it."""

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from ask_lightning import (
    ASKModule,
    DriftMonitor,
    InfluenceMonitor,
    KnowledgeDistillationLoss,
    KnowledgeRefreshCallback,
    NTXentLoss,
    ReliabilityOTLoss,
    SigmoidLoss,
    TripletLoss,
)
from ask_lightning import losses as library
from ask_lightning.callbacks import QueryTable
from ask_lightning.cli import main
from ask_lightning.cli.ask_section import add_ask_arguments, ask_module
from ask_lightning.cli.compose import compose, shipped_configs, shipped_roles
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.flags import check_flags
from tests.helpers.command_line import BASELINE, Distance, ask_lightning, logged, refusal
from tests.helpers.retrievers import resnet38_bert

PLACES = {"run": "runs/x", "datasets": "data", "weights": "weights"}
LOSSES = shipped_roles().losses
# Without randomness of its own a run is the same as another one.
PLAIN = ("--model.spec_augment", "false", "--model.dropout", 0)
OF_KNOWLEDGE = (KnowledgeRefreshCallback, DriftMonitor, InfluenceMonitor, QueryTable)


def callbacks_of_ask(cli) -> set[type]:
    return {type(one) for one in cli.trainer.callbacks} & {*OF_KNOWLEDGE}


def weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_every_loss_of_the_library_has_a_part():
    kinds = {name for name in library.__all__ if name != "RetrievalLoss"}
    named = {
        compose([loss], PLACES).config["ask"]["loss"]["class_path"].removeprefix("ask_lightning.losses.")
        for loss in LOSSES
    }
    assert named == kinds


def test_every_name_composes_a_loss_with_options_that_it_has():
    for name, parts in shipped_configs().items():
        made = compose([name], PLACES)
        assert [part for part in made.parts if part in parts] == parts, name  # a part may name others
        assert {"model", "data", "trainer"} <= set(made.config), name
        if name.endswith("_baseline"):
            assert "ask" not in made.config, name
            continue
        section = made.config["ask"]
        assert section["enabled"], name
        kind = getattr(library, section["loss"]["class_path"].rpartition(".")[2])
        kind(**section["loss"].get("init_args", {}))
        assert kind.needs_knowledge == ("refresh" in section), name


def test_names_with_another_source_are_those_of_the_loss_that_looks_it_up():
    with_source = [loss for loss in LOSSES if f"clotho_ced_sonar_{loss}_enriched" in shipped_configs()]
    assert with_source == ["ask", "mined_negatives"]
    assert shipped_configs()["clotho_ced_sonar_ask_wavcaps"][-2:] == ["ask", "wavcaps"]
    assert "clotho_ced_sonar_ask_audiocaps_enriched" not in shipped_configs()


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_and_is_tested(loss, demo):
    backbone = ("clotho_ced_sonar", "audiocaps_resnet38_bert")[LOSSES.index(loss) % 2]
    given = ("--config", f"{backbone}_{loss}", demo, "--run", "run")
    cli = ask_lightning("fit", *given, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    assert isinstance(cli.model, ASKModule)
    curves = logged(Path("run"))
    assert len(curves["ask/loss"]) == 2
    assert all(math.isfinite(value) for values in curves.values() for value in values)
    assert cli.model.loss.needs_knowledge == (KnowledgeRefreshCallback in callbacks_of_ask(cli))
    tested = ask_lightning("test", *given, "--ckpt_path", "best")
    assert 0 <= tested.trainer.callback_metrics["test/mean_recall"] <= 1


def test_without_knowledge_nothing_is_encoded_and_the_baseline_is_met(demo):
    """Plain NT-Xent through the wrapper ends with the weights of the model that trains by itself."""
    given = (demo, *PLAIN, "--trainer.max_epochs", 1)
    cli = ask_lightning("fit", "--config", "audiocaps_resnet38_bert_ntxent", *given, "--run", "wrapped")
    assert type(cli.model.loss) is NTXentLoss
    assert callbacks_of_ask(cli) == set()
    assert cli.model.loss.knowledge is None
    assert not list(Path("wrapped/checkpoints").glob("knowledge*"))
    assert {"ask/loss", "ask/contrastive_t2a"} <= set(logged(Path("wrapped")))
    ask_lightning("fit", "--config", BASELINE, *given, "--run", "plain")
    expected = weights("plain")
    assert list(weights("wrapped")) == list(expected)
    for name, value in weights("wrapped").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_the_teacher_has_knowledge_but_no_neighbours_to_show(demo):
    given = ("--config", "audiocaps_resnet38_bert_teacher", demo, "--run", "run", *PLAIN)
    cli = ask_lightning("fit", *given, "--trainer.max_epochs", 1)
    loss = cli.model.loss
    assert type(loss) is KnowledgeDistillationLoss
    assert (loss.temperature, loss.distillation_weight, loss.teacher_temperature) == (0.15, 0.7, 0.1)
    assert callbacks_of_ask(cli) == {KnowledgeRefreshCallback, DriftMonitor}
    assert logged(Path("run"))["ask/unknown_clips"] == [0] * len(logged(Path("run"))["ask/loss"])
    ask_lightning("fit", *given, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    whole = ("--config", "audiocaps_resnet38_bert_teacher", demo, "--run", "whole", *PLAIN)
    ask_lightning("fit", *whole, "--trainer.max_epochs", 2)
    for name, value in weights("whole").items():
        torch.testing.assert_close(weights("run")[name], value, rtol=0, atol=0, msg=name)


def test_a_loss_by_flags_takes_the_models_temperature_and_the_run_repeats(demo):
    given = ("--config", BASELINE, "--config", "ask", demo, "--run", "run", *PLAIN)
    flags = ("--ask.loss", "SigmoidLoss", "--ask.loss.bias", -3, "--model.temperature", 0.4)
    cli = ask_lightning("fit", *given, *flags, "--trainer.max_epochs", 1)
    assert type(cli.model.loss) is SigmoidLoss
    assert (cli.model.loss.temperature, cli.model.loss.bias) == (0.4, -3.0)
    assert callbacks_of_ask(cli) == set()
    (config,) = Path("run/logs").glob("*/config.yaml")
    again = ask_lightning("fit", "--config", config, "--run", "again")
    assert again.model.loss.options == cli.model.loss.options
    for name, value in weights("run").items():
        torch.testing.assert_close(weights("again")[name], value, rtol=0, atol=0, msg=name)


def test_a_loss_without_temperature(demo):
    given = ("--config", "audiocaps_resnet38_bert_triplet", demo, "--trainer.max_epochs", 1)
    cli = ask_lightning("fit", *given, "--ask.loss.negatives", "all", "--ask.loss.positives", "ids")
    assert type(cli.model.loss) is TripletLoss
    assert (cli.model.loss.margin, cli.model.loss.negatives) == (0.2, "all")


def test_a_loss_of_ones_own():
    Path("mine.yaml").write_text(
        "model: {class_path: tests.helpers.command_line.Towers}\n"
        "data: {class_path: tests.helpers.command_line.Numbers}\n"
        "ask:\n"
        "  audio: listen\n"
        "  text: read\n"
        "  loss: {class_path: tests.helpers.command_line.Distance, init_args: {power: 3.0}}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, default_root_dir: '{run}'}\n"
    )
    cli = ask_lightning("fit", "--config", "mine.yaml", "--run", "run")
    assert type(cli.model.loss) is Distance
    assert cli.model.loss.power == 3
    assert callbacks_of_ask(cli) == set()


def test_the_default_is_the_papers():
    Path("mine.yaml").write_text(
        "model: {class_path: tests.helpers.command_line.Towers}\n"
        "data: {class_path: tests.helpers.command_line.Numbers}\n"
        "ask: {audio: listen, text: read, monitors: false, refresh: {num_prototypes: 4}}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, default_root_dir: '{run}'}\n"
    )
    cli = ask_lightning("fit", "--config", "mine.yaml", "--run", "run")
    assert cli.model.loss.options == ReliabilityOTLoss().options
    assert callbacks_of_ask(cli) == {KnowledgeRefreshCallback}


def test_options_of_the_refresh_reach_what_a_teacher_reads_of_ones_own_recordings(
    demo, tmp_path, monkeypatch
):
    """Its clips are the source itself, not encoded once more beside it without these options."""
    monkeypatch.chdir(tmp_path)
    given = ("fit", "--config", "tiny_teacher", demo, "--trainer.max_epochs", 4)
    flags = {
        "whole": (),
        "graph": ("--ask.refresh.refine", "graph"),
        "half": ("--ask.refresh.storage", "float16"),
    }
    runs = {}
    for name, options in flags.items():
        cli = ask_lightning(*given, "--run", name, *options)
        assert cli.model.loss.knowledge.training_clips is None
        runs[name] = weights(name)
    for name in ("graph", "half"):
        assert any(not torch.equal(value, runs[name][key]) for key, value in runs["whole"].items()), name
    ask_lightning(*given, "--run", "rolling", "--ask.refresh.mode", "rolling", "--ask.refresh.T", 2)
    assert logged(Path("rolling"))["ask/encoded_share"] == pytest.approx([1, 0.5, 0.5, 0.5])


def test_a_teacher_does_not_take_knowledge_that_it_would_not_look_up(demo, capsys):
    given = ("fit", "--config", "audiocaps_tiny_teacher", demo)
    refused = refusal(capsys, *given, "--data.knowledge.exclude", "[Y1]")
    assert "KnowledgeDistillationLoss learns from the training clips alone" in refused
    cli = ask_lightning(*given, "--trainer.fast_dev_run", 1)
    assert cli.model.loss.knowledge.training_clips is None, "its clips are encoded once, as the source"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ask.refresh.T", 3], "--ask.refresh.T has no effect, because TripletLoss needs no knowledge."),
        (["--ask.monitors=true"], "--ask.monitors has no effect, because TripletLoss needs no knowledge."),
        (["--ask.loss.margin", -1], "Argument `margin` has to be at least 0, but got -1.0"),
        (["--ask.loss.temperature", 0.1], "Option 'temperature' is not accepted"),
        (["--ask.loss.negatives", "easy"], "negatives"),
        (["--ask.loss", "Tripel"], "Tripel"),
    ],
)
def test_one_line_for_what_a_loss_refuses(flags, message, demo, capsys):
    given = ("fit", "--config", "audiocaps_resnet38_bert_triplet", demo)
    assert message in refusal(capsys, *given, *flags)


def test_every_option_of_the_section_is_a_known_flag():
    parser = LightningArgumentParser()
    add_ask_arguments(parser)
    options = {action.dest.split(".")[1] for action in parser._actions if action.dest.startswith("ask.")}
    assert {"caption_ids", "refresh"} <= options
    check_flags("fit", {}, [f"--ask.{name}" for name in options])


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.help", "FolderData"),
        ("--model.help", "TinyRetriever"),
        ("--ask.loss.help", "NTXentLoss"),
        ("--ask.loss.help=NTXentLoss",),
    ],
)
def test_help_of_a_class_needs_no_config(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *flags])
    assert ended.value.code == 0
    assert flags[0].partition(".help")[0] in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "encode", "inspect"])
def test_every_flag_of_a_commands_help_is_known(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    flags = set(re.findall(r"(?:^|[\s,\[])(--[A-Za-z_][\w.]*)", capsys.readouterr().out))
    assert "--data" in {flag.partition(".")[0] for flag in flags}
    check_flags(command, {}, sorted(flags))


def section_of(kind, *, chunk_size=None, compile_loss=False, **refresh):
    return {
        "loss": partial(kind),
        "audio": None,
        "text": None,
        "ids": "clip_id",
        "caption_ids": "caption_id",
        "chunk_size": chunk_size,
        "compile_loss": compile_loss,
        "refresh": {"T": 15, "write_back": False} | refresh,
    }


@pytest.mark.parametrize(
    ("kind", "refresh", "expected"),
    [
        (library.ReliabilityOTLoss, {}, None),
        (library.ReliabilityOTLoss, {"write_back": True}, "caption_id"),
        (library.ReliabilityOTLoss, {"T": "auto"}, "caption_id"),
        (library.NTXentLoss, {"T": "auto"}, None),
    ],
)
def test_captions_are_told_apart_where_rows_are_found(kind, refresh, expected):
    options = ask_module(resnet38_bert(), section_of(kind, **refresh))._options()
    assert options["caption_ids"] == expected


@pytest.mark.parametrize(
    "kind", [library.NTXentLoss, library.ReliabilityOTLoss, library.KnowledgeDistillationLoss]
)
def test_the_loss_takes_the_models_interaction(kind):
    section = section_of(kind, chunk_size=8)
    module = ask_module(resnet38_bert(interaction="frames"), section)
    assert module.loss.interaction == "interaction"
    assert module._options()["chunk_size"] == 8
    assert ask_module(resnet38_bert(), section).loss.interaction is None


def test_the_loss_is_compiled_where_that_is_asked_for(monkeypatch):
    modes = []
    monkeypatch.setattr(library.NTXentLoss, "compile", lambda loss, mode: modes.append((type(loss), mode)))
    for compile_loss in (False, True):
        ask_module(resnet38_bert(), section_of(library.NTXentLoss, compile_loss=compile_loss))
    assert modes == [(library.NTXentLoss, "reduce-overhead")]


def test_a_loss_that_takes_no_tokens_is_refused_for_a_model_of_tokens():
    section = section_of(library.TripletLoss)
    with pytest.raises(UsageError, match="TripletLoss compares pooled embeddings, but ResNet38BERT compares"):
        ask_module(resnet38_bert(interaction="prototypes"), section)


def test_chunks_by_a_flag():
    Path("mine.yaml").write_text(
        "model: {class_path: tests.helpers.command_line.Towers}\n"
        "data: {class_path: tests.helpers.command_line.Numbers}\n"
        "ask: {audio: listen, text: read, loss: {class_path: NTXentLoss}}\n"
        "seed_everything: 1\n"
        "trainer: {max_epochs: 1, accelerator: cpu, default_root_dir: '{run}'}\n"
    )
    flags = {"whole": (), "chunks": ("--ask.chunk_size", 2)}
    whole, chunks = (
        ask_lightning("fit", "--config", "mine.yaml", "--run", run, *of_run) for run, of_run in flags.items()
    )
    assert chunks.model._options()["chunk_size"] == 2
    for name, value in whole.model.model.state_dict().items():
        torch.testing.assert_close(chunks.model.model.state_dict()[name], value, msg=name)
