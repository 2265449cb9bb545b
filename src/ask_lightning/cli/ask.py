"""The config's section `ask`: from options to the wrapped model and its callbacks."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser

from ask_lightning import (
    ASKModule,
    DriftMonitor,
    InfluenceMonitor,
    KnowledgeRefreshCallback,
    ReliabilityOTLoss,
)
from ask_lightning.callbacks import QueryTable
from ask_lightning.cli.errors import UsageError

SECTION = "ask"


def add_ask_arguments(parser: LightningArgumentParser) -> None:
    """Add the section, with the options of the loss and of the refresh under their own names.

    Args:
        parser: Of a command.
    """
    add = parser.add_argument
    add("--ask.enabled", type=bool, default=False, help="Train with ASK; a section `ask` in a config does.")
    for side in ("audio", "text"):
        help_text = f"The model's method that encodes {side}; null: found by its usual names."
        add(f"--ask.{side}", type=str | None, default=None, help=help_text)
    add("--ask.ids", type=str, default="clip_id", help="Key of a batch under which clip ids are.")
    add("--ask.monitors", type=bool, default=True, help="Log RDM, OBI and what queries retrieve.")
    # Not here: what a file cannot hold, and the temperature, which is the model's.
    parser.add_class_arguments(
        ReliabilityOTLoss, "ask.loss", skip={"temperature", "interaction"}, instantiate=False
    )
    parser.add_class_arguments(KnowledgeRefreshCallback, "ask.refresh", skip={"source"}, instantiate=False)


def check_ask(enabled: bool, arguments: Sequence[str]) -> None:
    """Refuse flags that would have no effect.

    Args:
        enabled: Whether the model trains with ASK.
        arguments: Of the command line.

    Raises:
        UsageError: There are flags for ASK, but ASK is not switched on.
    """
    given = [one.partition("=")[0] for one in arguments if one.startswith(f"--{SECTION}.")]
    idle = sorted({flag for flag in given if flag != f"--{SECTION}.enabled"})
    if idle and not enabled:
        raise UsageError(
            f"{', '.join(idle)} has no effect, because the config does not train with ASK. "
            "Add `--config ask`."
        )


def ask_module(model: pl.LightningModule, section: Mapping[str, Any]) -> ASKModule:
    """Wrap a model.

    Args:
        model: With methods that encode audio and text. Its `temperature` is that of the loss, so that
            baseline and ASK train with the same.
        section: The section `ask`.

    Returns:
        The module to train.
    """
    loss = ReliabilityOTLoss(temperature=getattr(model, "temperature", 0.07), **section["loss"])
    return ASKModule(model, loss, audio=section["audio"], text=section["text"], ids=section["ids"])


def ask_callbacks(data: pl.LightningDataModule, section: Mapping[str, Any]) -> list[pl.Callback]:
    """What renews the knowledge and watches it.

    Args:
        data: Its `knowledge_dataset`, if it has that method, is the source of the knowledge; else its
            training data are.
        section: The section `ask`.

    Returns:
        Callbacks for the trainer.
    """
    source = getattr(data, "knowledge_dataset", None)
    refresh = KnowledgeRefreshCallback(source=source, **section["refresh"])
    if not section["monitors"]:
        return [refresh]
    queries = QueryTable(audio=section["audio"], text=section["text"])
    return [refresh, DriftMonitor(), InfluenceMonitor(), queries]
