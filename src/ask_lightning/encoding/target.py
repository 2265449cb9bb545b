"""The parts of a training module that the callbacks work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from ask_lightning.encoding.outputs import as_embeddings
from ask_lightning.losses.reliability_ot import Ids, ReliabilityOTLoss

Embed = Callable[[Any], tuple[Tensor, Tensor, Ids | None]]


@dataclass(frozen=True)
class Target:
    """The loss that looks up knowledge and the way from a batch to embeddings.

    Attributes:
        loss: Where the knowledge is kept.
        embed: Batch → audio `(B, d)`, text `(B, d)`, clip ids or `None`.
    """

    loss: ReliabilityOTLoss
    embed: Embed


def find_target(module: pl.LightningModule) -> Target:
    """The parts of an `ASKModule`, or of a module that calls a `ReliabilityOTLoss` itself.

    The latter has the methods `encode_audio(batch)` and `encode_text(batch)` and, if its loss compares
    clips, `encode_ids(batch)`; or one method `embed_pairs(batch)` that returns all three.

    Raises:
        RuntimeError: The module has no such loss, several, or lacks a method.
    """
    name = type(module).__name__
    losses = [part for part in module.modules() if isinstance(part, ReliabilityOTLoss)]
    if len(losses) != 1:
        raise RuntimeError(
            f"KnowledgeRefreshCallback needs a module with one ReliabilityOTLoss, but {name} has "
            f"{len(losses)}. Wrap the model: trainer.fit(ASKModule(model), ...)."
        )
    (loss,) = losses
    if callable(embed_pairs := getattr(module, "embed_pairs", None)):
        return Target(loss, embed_pairs)
    needed = ["encode_audio", "encode_text", *(["encode_ids"] if loss.needs_ids else [])]
    missing = [method for method in needed if not callable(getattr(module, method, None))]
    if missing:
        raise RuntimeError(
            f"{name} calls a ReliabilityOTLoss itself and so needs the methods {needed} that take a batch, "
            f"but lacks {missing}. Add them, or wrap a model: ASKModule(model, audio=..., text=...)."
        )

    def embed(batch: Any) -> tuple[Tensor, Tensor, Ids | None]:
        audio, text = (as_embeddings(getattr(module, name)(batch), name) for name in needed[:2])
        return audio, text, module.encode_ids(batch) if loss.needs_ids else None  # type: ignore[operator]

    return Target(loss, embed)
