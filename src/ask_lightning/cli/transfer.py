"""`ask-lightning transfer`: train on one dataset, test on it and, zero-shot, on another (paper Figure 4)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from ask_lightning.cli.commands import run_invocation
from ask_lightning.cli.compose import Composition, shipped_parts
from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.flags import Flags, Invocation
from ask_lightning.data import PublishedDataModule
from ask_lightning.metrics.table import percentages, scores_markdown, write_scores

DATASETS = ("audiocaps", "clotho")
"""Parts that can take each other's place."""


def transfer(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run the command: fit, two tests of the best epoch, and a table on the screen and in the run's folder.

    The evaluation clips of both datasets are kept out of the knowledge.

    Args:
        arguments: What follows `transfer`: those of `fit`, and `--target NAME` with options of that dataset
            as `--target.root` and so on.

    Returns:
        Percent by dataset and metric.

    Raises:
        UsageError: The command line cannot be used, or the target is not there.
    """
    parser = Flags(add_help=False, allow_abbrev=False)
    parser.add_argument("--target", choices=DATASETS, required=True)
    known, others = parser.parse_known_args(arguments)
    options, rest = _split_options(others)
    invocation = Invocation.parse(rest)
    target = target_data(invocation, known.target, options)
    cli = run_invocation("fit", invocation, held_out=target.evaluation_clips())
    trainer, source = cli.trainer, cli.datamodule
    # Of the first of several, which is that of the best epoch. Without any, the last epoch is tested.
    checkpoint = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    rows = {}
    # Under the names of `test/` the loggers shall show the dataset of the training alone.
    for data, loggers in ((source, trainer.loggers), (target, [])):
        trainer.loggers = loggers
        (metrics,) = trainer.test(cli.model, datamodule=data, ckpt_path=checkpoint, verbose=False)
        rows[_name(data)] = percentages(metrics, "test/")
    _report(rows, _name(source), Path(trainer.default_root_dir))
    return rows


def target_data(invocation: Invocation, target: str, options: Sequence[str] = ()) -> PublishedDataModule:
    """The data of another dataset under the settings of a config.

    Args:
        invocation: Of the training.
        target: One of `DATASETS`.
        options: Flags for the data, as `--data.root X`.

    Returns:
        The data module, whose test split has been looked up.

    Raises:
        UsageError: The config has no such dataset, the same one, or an option is unknown.
        FileNotFoundError: The target is not there.
    """
    made = invocation.compose()
    source = _source(made)
    if source == target:
        raise UsageError(f"The config trains on {source} already. Pass another `--target`.")
    section = invocation.compose(instead={source: target}).config["data"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    given = parser.parse_args(["--data", json.dumps(section), *options])
    data: Any = parser.instantiate_classes(given)["data"]
    # Now, and not after hours of training.
    assert isinstance(data, PublishedDataModule)
    if "test" not in data.datasets:
        raise UsageError(f"The target {target} has no test split in {section['init_args']['root']!r}.")
    return data


def _source(made: Composition) -> str:
    found = [part for part in made.parts if part in DATASETS]
    if len(found) != 1:
        raise UsageError(
            f"`transfer` needs a config that is composed of one of the parts {', '.join(DATASETS)}, but got "
            f"{', '.join(made.parts) or 'none'} of {', '.join(shipped_parts())}."
        )
    return found[0]


def _split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--target.X` as flags for the data, and all others."""
    options: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--target."):
            rest.append(argument)
            continue
        options.append("--data." + argument.removeprefix("--target."))
        if "=" not in argument:
            options.extend([value for value in [next(waiting, None)] if value is not None])
    return options, rest


@rank_zero_only
def _report(rows: dict[str, dict[str, float]], source: str, folder: Path) -> None:
    path = folder / "transfer.csv"
    print(f"\nTrained on {source}, tested in % on\n\n{scores_markdown(rows)}\n")
    write_scores(path, rows)
    print(f"The table is in {path} and {path.with_suffix('.json').name}.")


def _name(data: Any) -> str:
    return str(getattr(data, "dataset_name", type(data).__name__))
