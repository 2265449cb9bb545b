"""The loss and the encoders of a training module, which the callbacks work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ask_lightning.encoding.encode import Embed
from ask_lightning.encoding.encoders import embed_batch, find_encoders
from ask_lightning.encoding.names import NamedAsModel
from ask_lightning.losses.base import Ids, RetrievalLoss
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss

EncodeIds = Callable[[Any], Ids | None]
"""From a batch to the ids of its samples."""


@dataclass(frozen=True)
class Target:
    """The loss of a training module, and the function that embeds its batches.

    Attributes:
        loss: Loss that holds the knowledge base.
        embed: Function from a batch to audio `(B, d)`, text `(B, d)`, clip ids or `None`, and caption ids if
            there are any.
        pair_ids: Function from a batch to its clip ids, `None` where only `embed` knows them, and its caption
            ids; `None` where captions have no ids.
    """

    loss: RetrievalLoss
    embed: Embed
    pair_ids: Callable[[Any], tuple[Ids | None, Ids | None]] | None = None


def find_target(module: pl.LightningModule) -> Target:
    """Find the loss and the encoders of a module that trains with ASK.

    It is an `ASKModule`, or a module that calls a loss of `ask_lightning.losses` itself. The latter has two
    methods that take a batch and encode audio and text, under names that `find_encoders` finds, and, if its
    loss compares clips, a method `encode_ids(batch)`. Or it has one method `embed_pairs(batch)` that returns
    all three. Where captions of a clip are to be told apart, it has a method `encode_caption_ids(batch)`
    besides.

    Args:
        module: The module that the trainer trains.

    Returns:
        Its loss, and a function that embeds a batch.

    Raises:
        RuntimeError: The module has no such loss, several of them, or no method `encode_ids` that it needs.
        ValueError: The module has no methods that encode audio and text.
    """
    name = type(module).__name__
    losses = [part for part in module.modules() if isinstance(part, RetrievalLoss)]
    if isinstance(module, NamedAsModel):  # its model may have a loss of its own, for the wrapper's to replace
        of_model = [loss for loss in losses if loss is not module.loss]
        if any(loss.needs_knowledge for loss in of_model):
            raise RuntimeError(
                f"{type(module.model).__name__} has a loss of its own that looks up knowledge, as that of "
                f"{name} does. Train it without {name}, or take its loss out."
            )
        losses = [loss for loss in losses if loss is module.loss]
    if len(losses) != 1:
        raise RuntimeError(
            "The callbacks of ask_lightning need a module with one loss of ask_lightning.losses, but "
            f"{name} has {len(losses)}. Wrap the model: trainer.fit(ASKModule(model), ...)."
        )
    (loss,) = losses
    if not loss.is_bound:  # a wrapper has bound it to its model
        loss.bind(module)
    encode_caption_ids: EncodeIds | None = getattr(module, "encode_caption_ids", None)
    if callable(embed_pairs := getattr(module, "embed_pairs", None)):
        target = Target(loss, embed_pairs)
        return _with_captions(target, lambda batch: None, encode_caption_ids)
    encoders = find_encoders(module)
    takes_ids = loss.needs_ids or encode_caption_ids is not None
    encode_ids: EncodeIds | None = getattr(module, "encode_ids", None)
    if takes_ids and encode_ids is None:
        reason = "compares clips" if loss.needs_ids else "shall know captions of a clip by their ids"
        raise RuntimeError(
            f"{name} calls a {type(loss).__name__} that {reason}, and so needs a method `encode_ids` "
            "that takes a batch and returns its clip ids. Add it, or wrap a model: ASKModule(model, ids=...)."
        )

    def embed(batch: Any) -> tuple[Tensor, Tensor, Ids | None]:
        audio, text = embed_batch(module, *encoders, batch)
        return audio, text, encode_ids(batch) if takes_ids and encode_ids is not None else None

    return _with_captions(Target(loss, embed), encode_ids, encode_caption_ids)


def _with_captions(
    target: Target, encode_ids: EncodeIds | None, encode_caption_ids: EncodeIds | None
) -> Target:
    """The target with the caption ids of its batches, if there are any."""
    if encode_caption_ids is None:
        return target
    assert encode_ids is not None

    def embed(batch: Any) -> tuple[Any, ...]:
        return *target.embed(batch), encode_caption_ids(batch)

    def pair_ids(batch: Any) -> tuple[Ids | None, Ids | None]:
        return encode_ids(batch), encode_caption_ids(batch)

    return replace(target, embed=embed, pair_ids=pair_ids)


def reliability_loss(target: Target, wanted_by: object) -> ReliabilityOTLoss:
    """The loss of a target, which a callback needs to be the published one.

    Args:
        target: The loss and the encoders of a module.
        wanted_by: The callback that needs it, for the error message.

    Raises:
        RuntimeError: The module trains with another loss.
    """
    if not isinstance(target.loss, ReliabilityOTLoss):
        raise RuntimeError(
            f"{type(wanted_by).__name__} shows the neighbours and the reliability of a ReliabilityOTLoss, "
            f"but the module trains with {type(target.loss).__name__}. Leave the callback out."
        )
    return target.loss
