"""The methods that tables and figures are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ask_lightning.losses import NTXentLoss, ReliabilityOTLoss
from ask_lightning.reproduce.methods import LOSSES, LossVariant
from ask_lightning.reproduce.study import Entry
from ask_lightning.reproduce.tasks.task import Task

NT_XENT = Entry("NT-Xent", LOSSES["NT-Xent"])
"""The contrast within a batch, which the paper's backbones are trained with."""

LABEL_SMOOTHING = Entry("Label smoothing", LOSSES["Label smoothing"])
"""NT-Xent with smoothed targets."""

TEACHER = Entry("Teacher", LOSSES["Teacher"])
"""`KnowledgeDistillationLoss`."""

ASK = Entry("ASK", LOSSES["ASK"])
"""ASK as published, with the training pairs as knowledge: ASK+ in the paper."""


def ask(
    change: str, *, refresh: Mapping[str, Any] | None = None, like: Entry | None = None, **options: Any
) -> Entry:
    """ASK with something changed.

    Args:
        change: What is changed; the name is `"ASK, "` with it.
        refresh: Arguments of `KnowledgeRefreshCallback` that are changed.
        like: Entry whose settings it takes; None: it chooses its own.
        options: Arguments of `ReliabilityOTLoss` that are changed.
    """
    variant = LossVariant(ReliabilityOTLoss, LOSSES["ASK"].grid, options=options, refresh=refresh or {})
    return Entry(f"ASK, {change}", variant, like=like)


def ask_with_sources(task: Task) -> dict[str, Entry]:
    """ASK with each other knowledge source of a task, by the source's name.

    Args:
        task: The task.
    """
    return {
        name: ask(f"knowledge: {name}", refresh={"source": make})
        for name, make in task.knowledge_sources.items()
    }


def by_tokens(name: str, tokens: str, *, refresh: Mapping[str, Any] | None = None, plain: bool) -> Entry:
    """A model that compares by tokens, with NT-Xent or with ASK.

    Args:
        name: Name of the entry.
        tokens: `"prototypes"` or `"frames"`.
        refresh: Arguments of `KnowledgeRefreshCallback` that are changed.
        plain: Whether it is trained with NT-Xent.
    """
    loss, grid = (NTXentLoss, "NT-Xent") if plain else (ReliabilityOTLoss, "ASK")
    options = {"interaction": "interaction"}
    return Entry(name, LossVariant(loss, LOSSES[grid].grid, options=options, refresh=refresh or {}), tokens)
