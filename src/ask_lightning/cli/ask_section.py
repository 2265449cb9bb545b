"""The section `ask` of a config: its options, the wrapped model and its callbacks."""

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
    """Add the section to a parser, with the options of the loss and of the refresh.

    Args:
        parser: The parser of one command.
    """
    add = parser.add_argument
    add("--ask.enabled", type=bool, default=False, help="Train with ASK; a section `ask` in a config does.")
    for side in ("audio", "text"):
        help_text = f"The model's method that encodes {side}; null: found by its usual names."
        add(f"--ask.{side}", type=str | None, default=None, help=help_text)
    add("--ask.ids", type=str, default="clip_id", help="Key of a batch under which clip ids are.")
    add("--ask.monitors", type=bool, default=True, help="Log RDM, OBI and what queries retrieve.")
    # Left out are objects, which a file cannot hold, and the temperature, which is the model's.
    parser.add_class_arguments(
        ReliabilityOTLoss, "ask.loss", skip={"temperature", "interaction"}, instantiate=False
    )
    parser.add_class_arguments(KnowledgeRefreshCallback, "ask.refresh", skip={"source"}, instantiate=False)


def check_ask(enabled: bool, arguments: Sequence[str]) -> None:
    """Refuse flags of ASK for a model that trains without it.

    Args:
        enabled: Whether the model trains with ASK.
        arguments: The arguments of the command line.

    Raises:
        UsageError: There are flags of ASK, but ASK is not switched on.
    """
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith(f"--{SECTION}.")}
    without_effect = sorted(flags - {f"--{SECTION}.enabled"})
    if without_effect and not enabled:
        raise UsageError(
            f"{', '.join(without_effect)} has no effect, because the config does not train with ASK. "
            "Add `--config ask`."
        )


def ask_module(model: pl.LightningModule, section: Mapping[str, Any]) -> ASKModule:
    """Wrap a model for training with ASK.

    Args:
        model: A model with methods that encode audio and text. The loss takes the model's `temperature`, so
            that baseline and ASK train with the same one.
        section: The parsed section `ask`.

    Returns:
        The module to train.
    """
    loss = ReliabilityOTLoss(temperature=getattr(model, "temperature", 0.07), **section["loss"])
    return ASKModule(model, loss, audio=section["audio"], text=section["text"], ids=section["ids"])


def ask_callbacks(data: pl.LightningDataModule, section: Mapping[str, Any]) -> list[pl.Callback]:
    """The callbacks that renew the knowledge and monitor it.

    Args:
        data: The data of the run. What its method `knowledge_dataset` returns is the source of the
            knowledge; without that method the training data are.
        section: The parsed section `ask`.

    Returns:
        The callbacks for the trainer.
    """
    source = getattr(data, "knowledge_dataset", None)
    refresh = KnowledgeRefreshCallback(source=source, **section["refresh"])
    if not section["monitors"]:
        return [refresh]
    queries = QueryTable(audio=section["audio"], text=section["text"])
    return [refresh, DriftMonitor(), InfluenceMonitor(), queries]
