"""`ask-lightning transfer`: train on one dataset, test on it and, zero-shot, on another (paper Figure 4)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from ask_lightning.cli.commands import run_with_options
from ask_lightning.cli.compose import Composition
from ask_lightning.cli.errors import UsageError, construct, usage_errors
from ask_lightning.cli.run_options import FlagParser, RunOptions, data_flags
from ask_lightning.cli.trainer import RetrievalTrainer
from ask_lightning.data import PublishedDataModule
from ask_lightning.metrics.table import percentages, score_table, write_scores
from ask_lightning.utilities.text_tables import print_table

DATASETS = ("audiocaps", "clotho")
"""Config parts of the datasets between which models can be transferred."""


def transfer(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Train, test the best epoch on two datasets, and write the table.

    The evaluation clips of both datasets are kept out of the knowledge. The table is printed and written to
    the folder of the run.

    Args:
        arguments: What follows `transfer`: the arguments of `fit`, `--target NAME`, and options of the
            target's data, such as `--target.root`.

    Returns:
        Scores in percent, by dataset and metric.

    Raises:
        UsageError: The command line cannot be used, or the target does not exist.
    """
    parser = FlagParser(
        prog="ask-lightning transfer",
        description=__doc__,
        epilog="The flags of `ask-lightning fit` are understood, too; --target.X is --data.X of the target.",
        allow_abbrev=False,
    )
    parser.add_argument("--target", choices=DATASETS, required=True, help="the dataset to test on as well")
    known, others = parser.parse_known_args(arguments)
    target_flags, fit_arguments = _split_target_flags(others)
    options = RunOptions.parse(fit_arguments)
    target = target_data(options, known.target, target_flags)
    cli = run_with_options("fit", options, held_out=target.evaluation_clips())
    trainer, source = cli.trainer, cli.datamodule
    assert isinstance(trainer, RetrievalTrainer)
    # The trainer's first checkpoint callback keeps the best epoch. Without any, the last epoch is tested.
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    rows = {}
    # The loggers show the dataset of the training alone under the names of `test/`.
    for data, loggers in ((source, trainer.loggers), (target, [])):
        trainer.loggers = loggers
        (metrics,) = trainer.test(
            cli.model, datamodule=data, ckpt_path=checkpoint, verbose=False, calibrate=False
        )
        rows[_dataset_name(data)] = percentages(metrics, "test/")
    _report(rows, _dataset_name(source), Path(trainer.default_root_dir))
    return rows


def target_data(options: RunOptions, target: str, target_flags: Sequence[str] = ()) -> PublishedDataModule:
    """The data of another dataset under the settings of a config.

    Args:
        options: The flags of the training.
        target: One of `DATASETS`.
        target_flags: Flags for the data of the target, such as `--data.root X`.

    Returns:
        The data module, whose test split has been looked up.

    Raises:
        UsageError: The config has no such dataset or the same one, an option is unknown, the target does not
            exist, or its rate or the style of its captions is not that of the training.
    """
    composition = options.compose()
    source = _source_dataset(composition)
    if source == target:
        raise UsageError(f"The config trains on {source} already. Pass another `--target`.")
    section = options.compose(replacements={source: target}).config["data"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parser.add_instantiator(construct, object)
    with usage_errors():
        given = parser.parse_args(["--data", json.dumps(section), *target_flags])
        trained_on = json.dumps(composition.config["data"])
        training = parser.parse_args(["--data", trained_on, *data_flags(options.lightning_arguments)])
        _check_reading(training["data"]["init_args"], given["data"]["init_args"])
        data: Any = parser.instantiate_classes(given)["data"]
        assert isinstance(data, PublishedDataModule)
        # Looked up now, and not after hours of training.
        splits = data.datasets
    if "test" not in splits:
        raise UsageError(f"The target {target} has no test split in {section['init_args']['root']!r}.")
    return data


def _check_reading(training: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Refuse a target whose clips or captions would be read otherwise than those of the training."""
    for name in ("sample_rate", "caption_style"):
        if training.get(name) != target.get(name):
            raise UsageError(
                f"The model is trained with {name} {training.get(name)!r}, but the target has "
                f"{target.get(name)!r}. Pass `--target.{name} {training.get(name)}`."
            )


def _source_dataset(composition: Composition) -> str:
    """The dataset that a config trains on."""
    found = [part for part in composition.parts if part in DATASETS]
    if len(found) != 1:
        raise UsageError(
            f"`transfer` goes between the datasets {' and '.join(DATASETS)}, and has to train on one of "
            f"them, but the config's parts are {', '.join(composition.parts) or 'none of the shipped ones'}. "
            "Pass one such as `--config clotho_clap_ask`. For other data, `fit` on the one and `test "
            "--ckpt_path best` on the other."
        )
    return found[0]


def _split_target_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Each `--target.X` with its value, as the flag `--data.X`; and all other arguments."""
    target_flags: list[str] = []
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--target."):
            others.append(argument)
            continue
        target_flags.append("--data." + argument.removeprefix("--target."))
        if "=" not in argument:
            target_flags += [value for value in [next(remaining, None)] if value is not None]
    return target_flags, others


@rank_zero_only
def _report(rows: dict[str, dict[str, float]], source: str, folder: Path) -> None:
    """Print and write the table."""
    path = folder / "transfer.csv"
    print(f"\nTrained on {source}, tested in %:")
    print_table(*score_table(rows, "dataset"), float_format=".1f")
    write_scores(path, rows)
    print(f"The table is in {path} and {path.with_suffix('.json').name}.")


def _dataset_name(data: Any) -> str:
    """The name of a dataset in the table."""
    return str(getattr(data, "dataset_name", type(data).__name__))
