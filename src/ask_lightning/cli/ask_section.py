"""The section `ask` of a config: its options, the wrapped model and its callbacks."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy

from ask_lightning import (
    ASKModule,
    DriftMonitor,
    InfluenceMonitor,
    KnowledgeRefreshCallback,
    ReliabilityOTLoss,
)
from ask_lightning.callbacks import QueryTable
from ask_lightning.callbacks.refresh_options import row_finding_option
from ask_lightning.cli.errors import UsageError
from ask_lightning.data import RetrievalDataModule
from ask_lightning.encoding.encoders import find_encoders
from ask_lightning.interaction import Interaction
from ask_lightning.losses import RetrievalLoss

SECTION = "ask"


def add_ask_arguments(parser: LightningArgumentParser) -> None:
    """Add the section to a parser, with the loss and the options of the refresh.

    Args:
        parser: The parser of one command.
    """
    add = parser.add_argument
    add(
        "--ask.enabled",
        type=bool,
        default=False,
        help="Train with the loss of this section; a section `ask` in a config turns it on.",
    )
    for side in ("audio", "text"):
        help_text = f"The model's method that encodes {side}; null: found by its usual names."
        add(f"--ask.{side}", type=str | None, default=None, help=help_text)
    add("--ask.ids", type=str, default="clip_id", help="Key of a batch under which clip ids are.")
    help_text = (
        "Key of a batch under which caption ids are, for `write_back` and `T: auto` of the refresh; null: "
        "captions of a clip are not told apart."
    )
    add("--ask.caption_ids", type=str | None, default="caption_id", help=help_text)
    help_text = "Most pairs that the encoders get at once in training; larger batches are encoded in chunks."
    add("--ask.chunk_size", type=int | None, default=None, help=help_text)
    help_text = (
        "Compile the loss, which on a GPU makes recorded graphs of it: about half a minute at the start."
    )
    add("--ask.compile_loss", type=bool, default=False, help=help_text)
    help_text = "Log RDM, OBI and what queries retrieve, as far as the loss uses the knowledge so."
    add("--ask.monitors", type=bool, default=True, help=help_text)
    # Left out are objects, which a file cannot hold, and the temperature, which is the model's.
    parser.add_subclass_arguments(
        RetrievalLoss,
        "ask.loss",
        skip={"temperature", "interaction"},
        required=False,
        default={"class_path": f"{ReliabilityOTLoss.__module__}.{ReliabilityOTLoss.__qualname__}"},
    )
    # Its constructor is called when there is a model to take the temperature from.
    parser.add_instantiator(_postpone, RetrievalLoss)
    parser.add_class_arguments(KnowledgeRefreshCallback, "ask.refresh", skip={"source"}, instantiate=False)


def check_ask(command: str, enabled: bool, arguments: Sequence[str]) -> None:
    """Refuse flags of the section where nothing is trained, or a model is trained with its own loss.

    Args:
        command: The command.
        enabled: Whether the model trains with the loss of the section.
        arguments: The arguments of the command line.

    Raises:
        UsageError: There are flags of ASK, but the command does not train or ASK is not switched on.
    """
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith(f"--{SECTION}.")}
    if flags and command != "fit":
        raise UsageError(
            f"{', '.join(sorted(flags))} has no effect, because `{command}` does not train. Leave it out."
        )
    without_effect = sorted(flags - {f"--{SECTION}.enabled"})
    if without_effect and not enabled:
        raise UsageError(
            f"{', '.join(without_effect)} has no effect, because the config does not train with ASK. "
            "Add `--config ask`, or the part of another loss."
        )


def check_encoders(model: pl.LightningModule, section: Mapping[str, Any], command: str) -> None:
    """Refuse to encode by other methods than those by which the config trains.

    Args:
        model: The model.
        section: The section `ask`.
        command: The command, which calls the methods that have the usual names.

    Raises:
        UsageError: The section names other methods.
    """
    named = (section["audio"], section["text"])
    try:
        found = find_encoders(model)
    except ValueError:
        return  # who encodes says so
    if any(name not in (None, usual) for name, usual in zip(named, found, strict=True)):
        raise UsageError(
            f"`{command}` encodes by {found[0]!r} and {found[1]!r} of {type(model).__name__}, but the config "
            f"trains by `ask.audio: {named[0] or 'null'}` and `ask.text: {named[1] or 'null'}`, so that what "
            "is searched would not be what was trained. Give the methods of training the usual names."
        )


def check_compilation(section: Mapping[str, Any], strategy: Strategy) -> None:
    """Refuse a compiled loss under a strategy whose processes would train with the loss as it was before.

    Args:
        section: The section `ask`.
        strategy: The strategy of the trainer.

    Raises:
        UsageError: The loss shall be compiled, and the strategy sends the model to processes that it starts.
    """
    if section["compile_loss"] and getattr(strategy, "_start_method", None) in ("spawn", "forkserver"):
        raise UsageError(
            f"`--{SECTION}.compile_loss true` has no effect under a strategy that sends a copy of the model "
            "to processes that it starts. Pass `--trainer.strategy ddp`, or leave one of them out."
        )


def check_knowledge_flags(loss: RetrievalLoss, arguments: Sequence[str]) -> None:
    """Refuse flags of the refresh and the monitors for a loss that needs no knowledge.

    Args:
        loss: The loss of the run.
        arguments: The arguments of the command line.

    Raises:
        UsageError: There are such flags.
    """
    flags = {argument.partition("=")[0] for argument in arguments}
    of_knowledge = (f"--{SECTION}.refresh", f"--{SECTION}.monitors")
    without_effect = sorted(flag for flag in flags if flag.startswith(of_knowledge))
    if without_effect and not loss.needs_knowledge:
        raise UsageError(
            f"{', '.join(without_effect)} has no effect, because {type(loss).__name__} needs no knowledge. "
            "Leave it out, or choose another loss by `--ask.loss`."
        )


def ask_module(model: pl.LightningModule, section: Mapping[str, Any]) -> ASKModule:
    """Wrap a model for training with ASK.

    Args:
        model: A model with methods that encode audio and text. The loss takes the model's `temperature`, so
            that baseline and ASK train with the same one; a model without has 0.07. A `Retriever` keeps its
            embedding regulariser. An interaction of the model is the loss's as well.
        section: The section `ask` after its classes were made.

    Returns:
        The module to train.
    """
    make_loss: partial[RetrievalLoss] = section["loss"]
    taken = signature(make_loss.func).parameters
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values())
    if "temperature" in taken or takes_any:
        make_loss = partial(make_loss, temperature=getattr(model, "temperature", 0.07))
    if isinstance(getattr(model, "interaction", None), Interaction):
        if "interaction" not in taken and not takes_any:
            raise UsageError(
                f"{make_loss.func.__name__} compares pooled embeddings, but {type(model).__name__} compares "
                "tokens by its interaction. Take NTXentLoss, KnowledgeDistillationLoss or ReliabilityOTLoss, "
                "or a model without."
            )
        make_loss = partial(make_loss, interaction="interaction")
    loss = make_loss()
    if section["compile_loss"]:
        loss.compile(mode="reduce-overhead")
    # A term that the model adds to its contrastive loss stays.
    criterion = "loss" if getattr(model, "embedding_regularizer", 0) else None
    # Batches of the user's own need not have caption ids that nobody reads.
    refresh = section["refresh"]
    finds_pairs = loss.needs_knowledge and row_finding_option(refresh["T"], refresh["write_back"])
    return ASKModule(
        model,
        loss,
        audio=section["audio"],
        text=section["text"],
        ids=section["ids"],
        caption_ids=section["caption_ids"] if finds_pairs else None,
        criterion=criterion,
        chunk_size=section["chunk_size"],
    )


def ask_callbacks(
    loss: RetrievalLoss, data: pl.LightningDataModule, section: Mapping[str, Any]
) -> list[pl.Callback]:
    """The callbacks that renew the knowledge and monitor it, as far as the loss uses knowledge.

    Args:
        loss: The loss of the run. One that needs no knowledge needs no callback.
        data: The data of the run. What its method `knowledge_dataset` returns is the source of the
            knowledge; without that method the training data are.
        section: The parsed section `ask`.

    Returns:
        The callbacks for the trainer.

    Raises:
        UsageError: The data have knowledge that the loss does not look up.
    """
    if not loss.needs_knowledge:
        return []
    source = getattr(data, "knowledge_dataset", None)
    is_training_set = getattr(type(data), "knowledge_dataset", None) is RetrievalDataModule.knowledge_dataset
    if not loss.reads_other_clips and getattr(data, "has_other_knowledge", False):
        raise UsageError(
            f"{type(loss).__name__} learns from the training clips alone, so other clips or captions for "
            "the knowledge have no effect. Leave them out, or take a loss that looks them up, such as that "
            "of the part `ask`."
        )
    if not loss.reads_other_clips or (loss.needs_training_clips and is_training_set):
        source = None  # else the same clips would be encoded twice, of which the loss reads the second ones
    refresh = KnowledgeRefreshCallback(source=source, **section["refresh"])
    if not section["monitors"]:
        return [refresh]
    monitors: list[pl.Callback] = [DriftMonitor()]
    if isinstance(loss, ReliabilityOTLoss):
        monitors += [InfluenceMonitor(), QueryTable(audio=section["audio"], text=section["text"])]
    return [refresh, *monitors]


def _postpone(kind: type[RetrievalLoss], *arguments: Any, **options: Any) -> partial[RetrievalLoss]:
    """A loss that is made later."""
    return partial(kind, *arguments, **options)
