"""The model that a config describes."""

import importlib
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ask_lightning.cli.errors import UsageError, construct, usage_errors

# Hyperparameters of a model that describe its batches: the config decides them, not the checkpoint.
_BATCH_PARAMETERS = ("sample_rate",)


def make_model(section: Mapping[str, Any]) -> pl.LightningModule:
    """Make the model that a config describes.

    Args:
        section: Class and arguments of the model, as `class_path` and `init_args`. Arguments may be classes
            with arguments of their own.

    Returns:
        The model.

    Raises:
        UsageError: There is no such class, or it refuses an argument.

    Examples:
        >>> section = {"class_path": "ask_lightning.models.TinyRetriever", "init_args": {"width": 8}}
        >>> make_model(section).hparams["width"]
        8
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    parser.add_instantiator(construct, object)
    with usage_errors():
        model = parser.instantiate_classes(parser.parse_object({"model": dict(section)}))["model"]
    assert isinstance(model, pl.LightningModule)
    return model


def take_arguments_from_checkpoint(section: Any, path: Path, given: Collection[str]) -> None:
    """Replace the model's arguments by those in a checkpoint, which needs no published weights.

    Args:
        section: The section `model` of the config.
        path: Path of the checkpoint.
        given: Names of the arguments that the command line gives. Each one that is replaced is told.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored: dict[str, Any] = dict(checkpoint.get("hyper_parameters", {}))
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{path} is no checkpoint that can be read: {reason}") from error
    arguments = section.get("init_args") or {}  # a class may have no arguments
    unknown = sorted(name for name in stored if name not in arguments)
    if unknown:
        raise UsageError(
            f"{path} is a checkpoint of another model than {section['class_path']}, which has no "
            f"{', '.join(f'`{name}`' for name in unknown)}. Pass the config with which it was trained."
        )
    changed = []
    for name, value in stored.items():
        if arguments[name] == value:
            continue
        if name in _BATCH_PARAMETERS:
            kind = load_class(str(section["class_path"]))
            if not getattr(kind, "resamples", False):
                rank_zero_warn(
                    f"{path} was trained with {name}={value}, but it is {arguments[name]} now, which "
                    f"changes what {kind.__name__} hears. Pass `--model.{name} {value}` and the same as "
                    f"`--data.{name}`."
                )
            continue
        # Other arguments of a config name files that the checkpoint replaces.
        if isinstance(value, int | float) or name in given:
            changed.append(f"{name}={value!r} in place of {arguments[name]!r}")
        arguments[name] = value
    if changed:
        rank_zero_info(f"The model is built as its checkpoint says: {', '.join(changed)}.")


def load_class(path: str) -> Any:
    """Import a class by its dotted name.

    Args:
        path: The dotted name, such as `"ask_lightning.models.CEDSonar"`.

    Returns:
        The class.

    Raises:
        UsageError: There is no such class.

    Examples:
        >>> load_class("ask_lightning.models.TinyRetriever").__name__
        'TinyRetriever'
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"There is no class {path!r}: {error}.") from error
