"""`ask-lightning export`: a trained model as a folder that can be loaded anywhere, and published."""

import errno
import json
import pickle
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from ask_lightning.cli.errors import UsageError, check_writable, usage_errors
from ask_lightning.cli.model_card import model_card
from ask_lightning.cli.model_section import load_class
from ask_lightning.cli.results import RESULTS_FILE, find_results, public_results, read_results
from ask_lightning.cli.run_config import run_of_checkpoint, training_config
from ask_lightning.cli.run_options import FlagParser
from ask_lightning.models import from_pretrained, save_pretrained
from ask_lightning.models.exported import CALIBRATION_FILE
from ask_lightning.models.hub import upload_folder
from ask_lightning.models.stored_calibration import calibration_fingerprint
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.weights import weights_fingerprint

# Of the checkpoints of a run, the first that is there.
_CHECKPOINTS = ("best.ckpt", "last.ckpt")


def export(arguments: Sequence[str]) -> Path:
    """Write a trained model into a folder, and upload it if that is asked for.

    Args:
        arguments: What follows `export` on the command line.

    Returns:
        The folder.

    Raises:
        UsageError: The command line, the checkpoint or the folder cannot be used, or the model could not be
            loaded from the folder.
    """
    parser = FlagParser(prog="ask-lightning export", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "run", type=Path, help="the folder of a run, whose best epoch is taken, or a checkpoint"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to write, which is new or empty"
    )
    parser.add_argument(
        "--class", dest="kind", help="the model's class, if there is no config beside the run"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        help="results of tests (default: all results.json of the run that are of these weights)",
    )
    parser.add_argument("--push", metavar="REPO", help="upload it to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    options = parser.parse_args(arguments)
    if options.private and options.push is None:
        raise UsageError("`--private` is about the repository of `--push`. Pass that too, or leave it out.")
    _check_output(options.output)
    checkpoint, run = _find_checkpoint(options.run)
    config = training_config(run)
    model = _load(checkpoint, options.kind or (config.get("model") or {}).get("class_path"))
    results = _matching_results(model, options.results, run)
    name = options.push or options.output.absolute().name
    calibration = _matching_calibration(model, run)
    with usage_errors():
        card = model_card(
            model,
            name.rpartition("/")[2],
            config=config,
            results=results,
            source=options.push or str(name),
            is_calibrated=calibration is not None,
        )
        _write(model, options.output, card, results, calibration)
    print(f"The model is in {options.output}: ask_lightning.models.from_pretrained({str(options.output)!r})")
    if options.push is not None:
        _push(options.output, options.push, private=options.private)
    written: Path = options.output
    return written


def _check_output(folder: Path) -> None:
    """Refuse a folder that holds something or cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty. Pass another `--output`, or empty it.")
    check_writable(folder)


def _find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint to export, and the folder of its run."""
    if path.is_file():
        return path, run_of_checkpoint(path)
    for name in _CHECKPOINTS:
        checkpoint = path / "checkpoints" / name
        if checkpoint.is_file():
            print(f"The checkpoint is {checkpoint}.", file=sys.stderr)
            return checkpoint, path
    if path.is_dir():
        raise UsageError(
            f"{path} holds no checkpoints/best.ckpt or last.ckpt. Pass the path of a checkpoint."
        )
    raise UsageError(f"There is no run and no checkpoint {str(path)!r}.")


def _load(checkpoint: Path, class_path: str | None) -> pl.LightningModule:
    """The model of a checkpoint, in evaluation mode."""
    if class_path is None:
        raise UsageError(
            f"There is no logs/version_*/config.yaml that names the class of the model in {checkpoint}. Pass "
            "it by `--class`, such as `--class ask_lightning.models.ResNet38BERT`."
        )
    kind = load_class(class_path)
    if not (isinstance(kind, type) and issubclass(kind, pl.LightningModule)):
        raise UsageError(f"{class_path} is no LightningModule.")
    try:
        return kind.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    except (RuntimeError, TypeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{checkpoint} is no checkpoint of {class_path}, or is damaged ({reason}). Pass another by "
            "`--class`."
        ) from error


def _matching_results(
    model: pl.LightningModule, paths: Sequence[Path] | None, run: Path
) -> list[dict[str, Any]]:
    """The results of tests of these very weights, without paths, the latest first."""
    fingerprint = weights_fingerprint(model)
    if paths is None:
        found = [one for one in find_results(run) if one["model"]["fingerprint"] == fingerprint]
        if not found:
            print(
                "There are no results of a test of this checkpoint, so the model card has none: "
                "`ask-lightning test … --ckpt_path best` before the export writes them.",
                file=sys.stderr,
            )
        return [public_results(one) for one in found]
    given = []
    for path in paths:
        results = read_results(path)
        if results is None:
            raise UsageError(
                f"{path} holds no results. `ask-lightning test` writes {RESULTS_FILE} into its run."
            )
        if results["model"]["fingerprint"] != fingerprint:
            raise UsageError(f"{path} holds the results of other weights. Test this checkpoint first.")
        given.append(public_results(results))
    return given


def _matching_calibration(model: pl.LightningModule, run: Path) -> Path | None:
    """The calibration that a test of these very weights has chosen."""
    if calibration_fingerprint(run) != weights_fingerprint(model):
        return None
    return run / CALIBRATION_FILE


def results_name(number: int) -> str:
    """Name of the file with some of the results of an exported model.

    Args:
        number: Number of the results, from 1 for the latest.

    Examples:
        >>> results_name(1), results_name(2)
        ('results.json', 'results-2.json')
    """
    return RESULTS_FILE if number == 1 else f"{Path(RESULTS_FILE).stem}-{number}.json"


def _write(
    model: pl.LightningModule,
    output: Path,
    card: str,
    results: Sequence[Mapping[str, Any]],
    calibration: Path | None,
) -> None:
    """Write the folder as a whole or not at all, and make sure that it loads."""
    folder = output.resolve()  # a link stays one
    with _unless_written_meanwhile(output), atomic_write(folder) as temporary:
        save_pretrained(model, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for number, one in enumerate(results, start=1):
            text = json.dumps(one, indent=2) + "\n"
            (temporary / results_name(number)).write_text(text, encoding="utf-8")
        if calibration is not None:
            shutil.copyfile(calibration, temporary / CALIBRATION_FILE)
        try:
            loaded = from_pretrained(temporary, type(model))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{type(model).__name__} could not be loaded from what would be its folder. Does its "
                f"`__init__` call `save_hyperparameters()`? {error}"
            ) from error
        if weights_fingerprint(loaded) != weights_fingerprint(model):
            raise UsageError(
                f"{type(model).__name__} has other weights after it is loaded from its folder: does its "
                "constructor or `load_state_dict` change them?"
            )
        if folder.exists():
            folder.rmdir()


@contextmanager
def _unless_written_meanwhile(output: Path) -> Iterator[None]:
    """Say so if another process has written the folder that was new or empty at the start."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UsageError(
            f"{output} has been written by another process meanwhile, and stays as it is. Pass another "
            "`--output`."
        ) from error


def _push(folder: Path, repository: str, *, private: bool) -> None:
    """Upload the exported model."""
    try:
        address = upload_folder(folder, repository, private=private)
    except OSError as error:
        raise UsageError(
            f"{folder} is written. {error} Then `hf upload {repository} {folder}` goes on."
        ) from error
    print(f"It is uploaded: {address}")
