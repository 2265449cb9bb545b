"""The configs that the commands of a run have left in its folder."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

# Keys of a config that only commands other than `fit` have.
_NOT_OF_FIT = ("verbose", "return_predictions", "split")
# Arguments of data that say how clips and captions are read, which they are, which clip is in which split,
# and which clips make a batch.
_FORM = ("seconds", "caption_style")
_PLACE = ("root", "annotations", "hub")
_SPLITTING = ("fractions", "split_seed", "clip_id_column", "split_column", "collection")
_BATCHES = ("batch_size", "seed")


def run_of_checkpoint(checkpoint: Path) -> Path:
    """The folder of the run that has written a checkpoint.

    Args:
        checkpoint: Path of the checkpoint.

    Examples:
        >>> run_of_checkpoint(Path("runs/mine/checkpoints/best.ckpt")).as_posix()
        'runs/mine'
    """
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder


def training_config(run: Path) -> dict[str, Any]:
    """The config of the latest `fit` of a run; else the model of that of another command.

    Args:
        run: Folder of the run.

    Returns:
        The config; empty if there is none.
    """
    found = sorted(run.glob("logs/version_*/config.yaml"), key=_version, reverse=True)
    configs = [config for path in found if isinstance(config := _read_config(path), dict)]
    of_fit = [config for config in configs if not any(key in config for key in _NOT_OF_FIT)]
    if of_fit:
        return dict(of_fit[0])
    # Which names the class; how the model was trained it does not know.
    return {"model": configs[0].get("model")} if configs else {}


def _read_config(path: Path) -> Any:
    """What a file holds; None, which is said, if it is no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        print(f"{path} is damaged and left out.", file=sys.stderr)
        return None


def _version(path: Path) -> int:
    number = re.search(r"version_(\d+)$", path.parent.name)
    return -1 if number is None else int(number[1])


def warn_of_other_data(section: Any, checkpoint: Path, *, uses_splits: bool, goes_on: bool) -> None:
    """Warn of what is given otherwise than in the training of a checkpoint.

    Args:
        section: The section `data` of the config.
        checkpoint: Path of the checkpoint, in the folder of its run.
        uses_splits: Whether the command reads a split, and not all clips.
        goes_on: Whether the command goes on with the training.
    """
    trained = training_config(run_of_checkpoint(checkpoint)).get("data") or {}
    if trained.get("class_path") != section.get("class_path"):
        return
    before, now = trained.get("init_args") or {}, section.get("init_args") or {}
    if changed := _changed(before, now, _FORM):
        rank_zero_warn(
            f"{checkpoint} was trained with clips or captions of another form ({changed}), on which recall "
            "depends. Pass the flags of the training, unless it is this difference that you look at."
        )
    if any(before.get(name) != now.get(name) for name in _PLACE):
        return
    if uses_splits and (changed := _changed(before, now, _SPLITTING)):
        rank_zero_warn(
            f"{checkpoint} was trained on other splits ({changed}): validation and test may hold its "
            "training clips. Pass the flags of the training."
        )
    if goes_on and (changed := _changed(before, now, _BATCHES)):
        rank_zero_warn(
            f"{checkpoint} was trained with other batches ({changed}), so the run does not go on as one "
            "without a break would. Pass the flags of the training."
        )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> str:
    """The arguments that have another value now, in words."""
    return ", ".join(
        f"{name}={now[name]!r} in place of {before[name]!r}"
        for name in names
        if name in before and name in now and _as_list(before[name]) != _as_list(now[name])
    )


def _as_list(value: Any) -> Any:
    """A sequence as a list, as a file has it."""
    return list(value) if isinstance(value, tuple) else value
