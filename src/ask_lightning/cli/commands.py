"""The commands of LightningCLI: the composed config is passed first, then the flags, which win."""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ask_lightning.data
from ask_lightning.cli.errors import UsageError, check_writable
from ask_lightning.cli.flags import without_options_of_others
from ask_lightning.cli.quiet import quiet_lightning
from ask_lightning.cli.results import results_of_test, write_results
from ask_lightning.cli.retrieval_cli import RetrievalCLI
from ask_lightning.cli.run_lock import is_first_process, locked_run
from ask_lightning.cli.run_options import FlagParser, RunOptions, repeated_flags
from ask_lightning.cli.trainer import RetrievalTrainer
from ask_lightning.data import FolderData, RetrievalDataModule
from ask_lightning.data.clips import Clip
from ask_lightning.models.stored_calibration import save_calibration


def run_command(command: str, arguments: Sequence[str]) -> RetrievalCLI:
    """Run a command of LightningCLI.

    Args:
        command: `"fit"`, `"validate"`, `"test"`, `"predict"` or `"encode"`.
        arguments: What follows the command.

    Returns:
        Model, data and trainer after the command.

    Raises:
        UsageError: The command line cannot be used.
    """
    options = RunOptions.parse(arguments)
    cli = run_with_options(command, options)
    if command == "test":
        _write_results(cli, ["ask-lightning", command, *arguments])
    if is_first_process():
        _say_what_is_next(command, options, cli)
    return cli


def run_with_options(command: str, options: RunOptions, held_out: Sequence[Clip] = ()) -> RetrievalCLI:
    """Run a command of LightningCLI whose own flags have been parsed.

    Args:
        command: `"fit"`, `"validate"`, `"test"`, `"predict"` or `"encode"`.
        options: The parsed flags.
        held_out: Evaluation clips of other datasets, to be kept out of the knowledge.

    Returns:
        Model, data and trainer after the command.

    Raises:
        UsageError: The command line cannot be used.
    """
    _silence_warnings()
    quiet_lightning()
    config = without_options_of_others(command, options.compose().config)
    _seed_batches(config, options.lightning_arguments)
    given = [
        argument for argument in options.lightning_arguments if argument.startswith(("--model", "--data"))
    ]
    flags = {argument.partition("=")[0] for argument in options.lightning_arguments}
    asks_for_help = any(flag in ("--help", "-h") or flag.endswith(".help") for flag in flags)
    if not (options.configs or given or asks_for_help):
        raise UsageError(
            f"`{command}` needs a model and data, so a config is required: pass `--config NAME`. "
            "`ask-lightning --help` lists the shipped ones."
        )
    arguments = [command]
    if config:
        arguments += ["--config", json.dumps(config)]
    if options.checkpoint is not None:
        arguments += ["--ckpt_path", options.checkpoint]
    arguments += options.lightning_arguments
    if asks_for_help or "--print_config" in flags:
        return RetrievalCLI(arguments, held_out)
    if command in ("fit", "validate", "test"):
        check_writable(
            options.run_folder / "logs",
            "Pass a folder of your own as `--run`; the checkpoint of another run goes by its path as "
            "`--ckpt_path`.",
        )
    if command != "fit":
        return RetrievalCLI(arguments, held_out)
    options.check_run_is_new(config)
    with locked_run(options.run_folder):
        return RetrievalCLI(arguments, held_out)


def _seed_batches(config: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Give this library's data the seed of the run, unless the config has another one for them.

    Otherwise the runs of several seeds would see the same batches, and their spread would be too small.
    """
    data = config.get("data") or {}
    package, _, name = str(data.get("class_path")).rpartition(".")
    kind = getattr(ask_lightning.data, name, None) if package in ("", "ask_lightning.data") else None
    if not (isinstance(kind, type) and issubclass(kind, RetrievalDataModule)):
        return
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seed_everything", default=(before := config.get("seed_everything")))
    seed = str(parser.parse_known_args(arguments)[0].seed_everything)
    section = data.setdefault("init_args", {})
    if seed.isdecimal() and section.get("seed", before) == before:
        section["seed"] = int(seed)


def _write_results(cli: RetrievalCLI, command: Sequence[str]) -> None:
    """Write what a test has measured into the folder of the run, in the first process."""
    trainer = cli.trainer
    assert isinstance(trainer, RetrievalTrainer)
    log_folder = trainer.log_dir  # collective
    if not is_first_process():
        return
    data = cli.config["test"].get("data") or {}
    results = results_of_test(
        trainer,
        cli.model,
        cli.datamodule,
        checkpoint=cli.config["test"].get("ckpt_path"),
        calibration=trainer.calibration,
        excluded_from_training=(data.get("init_args") or {}).get("exclude"),
        command=command,
    )
    run = Path(trainer.default_root_dir)
    path = write_results(run, results)
    if log_folder is not None and Path(log_folder) != run:
        write_results(Path(log_folder), results)  # which the next test leaves there
    if trainer.calibration is not None and trainer.calibration_bank is not None:
        fingerprint = results["model"]["fingerprint"]
        save_calibration(run, trainer.calibration_bank, trainer.calibration, fingerprint)
    print(f"The results are in {path}.", file=sys.stderr)


def _say_what_is_next(command: str, options: RunOptions, cli: RetrievalCLI) -> None:
    """Say where things are, and the next command."""
    trainer = cli.trainer
    assert isinstance(trainer, RetrievalTrainer)
    if command in ("encode", "predict"):
        if trainer.encoded_file is not None:
            _print_in_order(_searches(str(trainer.encoded_file), command, cli))
        return
    said = repeated_flags(options)
    next_ones = []
    weights = str(options.checkpoint)
    if command == "fit":
        run = Path(trainer.default_root_dir)
        # Without validation there is no best epoch.
        weights = "best" if (run / "checkpoints" / "best.ckpt").is_file() else "last"
        print(f"The run is in {run}, its {weights} epoch in checkpoints/{weights}.ckpt.", file=sys.stderr)
        tested = "test" if "test" in getattr(cli.datamodule, "datasets", ()) else "validate"
        next_ones.append(f"{tested} {said} --ckpt_path {weights}")
    if command == "fit" or options.checkpoint:
        split = "all" if isinstance(cli.datamodule, FolderData) else "test"
        given = f"{said} --ckpt_path {shlex.quote(weights)}"
        next_ones.append(f"encode {given} --split {split} --output sounds.safetensors")
        next_ones += _searches("sounds.safetensors", command, cli)
    _print_in_order(next_ones)


def _searches(file: str, command: str, cli: RetrievalCLI) -> list[str]:
    """Commands that search an encoded file."""
    searches = [f'search {shlex.quote(file)} --text "a dog barks"']
    data = cli.config[command].get("data") or {}
    if root := (data.get("init_args") or {}).get("root"):
        searches.append(f"serve {shlex.quote(file)} --audio {shlex.quote(str(root))}")
    return searches


def _print_in_order(commands: Sequence[str]) -> None:
    """Print commands that come one after another."""
    for number, command in enumerate(commands):
        print(f"{'Then: ' if number else 'Next: '}ask-lightning {command}", file=sys.stderr)


def _silence_warnings() -> None:
    """Silence warnings about what the user of a command line cannot change."""
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    # Lightning calls functions of jsonargparse that are deprecated.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
