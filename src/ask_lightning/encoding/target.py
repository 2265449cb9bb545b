"""The loss and the encoders of a training module, which the callbacks work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ask_lightning.encoding.encode import Embed
from ask_lightning.encoding.encoders import embed_batch, find_encoders
from ask_lightning.losses.base import Ids, RetrievalLoss
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss


@dataclass(frozen=True)
class Target:
    """The loss of a training module, and the function that embeds its batches.

    Attributes:
        loss: Loss that holds the knowledge base.
        embed: Function from a batch to audio `(B, d)`, text `(B, d)` and clip ids or `None`.
    """

    loss: RetrievalLoss
    embed: Embed


def find_target(module: pl.LightningModule) -> Target:
    """Find the loss and the encoders of a module that trains with ASK.

    It is an `ASKModule`, or a module that calls a loss of `ask_lightning.losses` itself. The latter has two
    methods that take a batch and encode audio and text, under names that `find_encoders` finds, and, if its
    loss compares clips, a method `encode_ids(batch)`. Or it has one method `embed_pairs(batch)` that returns
    all three.

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
    if len(losses) != 1:
        raise RuntimeError(
            "The callbacks of ask_lightning need a module with one loss of ask_lightning.losses, but "
            f"{name} has {len(losses)}. Wrap the model: trainer.fit(ASKModule(model), ...)."
        )
    (loss,) = losses
    if not loss.is_bound:  # a wrapper has bound it to its model
        loss.bind(module)
    if callable(embed_pairs := getattr(module, "embed_pairs", None)):
        return Target(loss, embed_pairs)
    encoders = find_encoders(module)
    if loss.needs_ids and not callable(getattr(module, "encode_ids", None)):
        raise RuntimeError(
            f"{name} calls a {type(loss).__name__} that compares clips, and so needs a method `encode_ids` "
            "that takes a batch and returns its clip ids. Add it, or wrap a model: ASKModule(model, ids=...)."
        )

    def embed(batch: Any) -> tuple[Tensor, Tensor, Ids | None]:
        audio, text = embed_batch(module, *encoders, batch)
        return audio, text, module.encode_ids(batch) if loss.needs_ids else None  # type: ignore[operator]

    return Target(loss, embed)


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
