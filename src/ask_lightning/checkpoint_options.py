"""What a checkpoint says of the wrapper and its loss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ask_lightning import losses
from ask_lightning.losses import RetrievalLoss

# Where a checkpoint keeps what belongs to ASK and not to the user's model.
CHECKPOINT_KEY = "ask_lightning"
# What a checkpoint holds in place of an argument that is a callable.
_CALLABLE = "<callable>"


def storable(options: Mapping[str, Any]) -> dict[str, str | int | None]:
    """Arguments of the wrapper as a file can hold them.

    Args:
        options: Arguments by name, some of which may be callables.
    """
    return {name: _CALLABLE if callable(value) else value for name, value in options.items()}


def completed(options: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the wrapper, completed by those of a checkpoint.

    Args:
        options: Arguments that are given.
        stored: Arguments in the checkpoint, as `storable` writes them.

    Raises:
        ValueError: One in the checkpoint was a callable and is not given.
    """
    if options.keys() & {"step", "criterion"}:  # they depend on each other
        stored = {name: value for name, value in stored.items() if name not in ("step", "criterion")}
    for name, value in stored.items():
        if name not in options and value == _CALLABLE:
            raise ValueError(
                f"The checkpoint was trained with a callable as `{name}`, which a file cannot hold. Pass it: "
                f"ASKModule.load_from_checkpoint(path, model, {name}=...)."
            )
    return {**stored, **options}


def without_address(option: Any) -> Any:
    """An option as stored in a checkpoint, without memory addresses in the representation of functions.

    Args:
        option: Value of the option.
    """
    return re.sub(r" at 0x[0-9a-f]+", "", option) if isinstance(option, str) else option


def class_path(loss: RetrievalLoss) -> str:
    """The class of a loss with its module.

    Args:
        loss: The loss.
    """
    return f"{type(loss).__module__}.{type(loss).__qualname__}"


def stored_loss(stored: Mapping[str, Any]) -> RetrievalLoss:
    """The loss with the class and the options in a checkpoint; nothing but this library's is imported.

    Args:
        stored: What the checkpoint has under `CHECKPOINT_KEY`.

    Raises:
        ValueError: The class is not of this library.
    """
    of_library: list[type[RetrievalLoss]] = [getattr(losses, name) for name in losses.__all__]
    kinds = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in of_library}
    if (path := stored["loss_class"]) not in kinds:
        raise ValueError(
            f"The checkpoint was trained with the loss {path}, which is not of this library. Pass it: "
            "ASKModule.load_from_checkpoint(path, model, loss=...)."
        )
    return kinds[path].from_options(stored["loss"])
