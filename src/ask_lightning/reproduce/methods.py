"""The losses that our comparisons train one model with, and the settings that each is tried with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ask_lightning.callbacks import DriftMonitor, KnowledgeRefreshCallback
from ask_lightning.callbacks.refresh_options import row_finding_option
from ask_lightning.encoding.encoders import find_interaction
from ask_lightning.losses import (
    CrossBatchMemoryLoss,
    HardNegativeLoss,
    HardNegativeMiningLoss,
    KnowledgeDistillationLoss,
    MomentumContrastLoss,
    NearestNeighborContrastiveLoss,
    NTXentLoss,
    ReliabilityOTLoss,
    RetrievalLoss,
    SigmoidLoss,
    TripletLoss,
)
from ask_lightning.module import ASKModule
from ask_lightning.reproduce.comparison import Method, Settings
from ask_lightning.reproduce.training import ModuleAndCallbacks
from ask_lightning.utilities.arguments import check_positive, check_range

_LEARNING_RATE_FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class LossVariant:
    """A loss, the settings that it is tried with, and what it differs in from others of its class.

    Attributes:
        loss: Class of the loss.
        grid: Arguments of the loss to choose from, six sets. First what separates most, so that a short
            comparison takes the first few.
        options: Further arguments of the loss, which are the same in each set.
        refresh: Arguments of `KnowledgeRefreshCallback` that differ from those of the task.
        callbacks: Functions without arguments that make further callbacks of a run. Worker processes get
            them by pickling.
    """

    loss: type[RetrievalLoss]
    grid: tuple[Settings, ...]
    options: Settings = field(default_factory=dict)
    refresh: Settings = field(default_factory=dict)
    callbacks: tuple[Callable[[], Callback], ...] = ()

    def candidates(self, learning_rate: float, count: int) -> tuple[Settings, ...]:
        """The settings that the loss is tried with.

        Six sets of the loss's own knobs at the given learning rate, then the first set at half and at twice
        of it.

        Args:
            learning_rate: Learning rate that suits the model, above 0.
            count: Number of settings, in [1, 8].

        Returns:
            Settings with a `learning_rate` and arguments of the loss.

        Raises:
            ValueError: An argument is outside its range.

        Examples:
            >>> LOSSES["NT-Xent"].candidates(1e-3, count=2)
            ({'temperature': 0.1, 'learning_rate': 0.001}, {'temperature': 0.05, 'learning_rate': 0.001})
        """
        check_positive("learning_rate", learning_rate)
        check_range("count", count, 1, MAX_CANDIDATES)
        settings = [{**own, "learning_rate": learning_rate} for own in self.grid]
        first = self.grid[0]
        settings += [{**first, "learning_rate": factor * learning_rate} for factor in _LEARNING_RATE_FACTORS]
        return tuple(settings[:count])


LOSSES: Mapping[str, LossVariant] = MappingProxyType(
    {
        "NT-Xent": LossVariant(
            NTXentLoss,
            (
                {"temperature": 0.1},
                {"temperature": 0.05},
                {"temperature": 0.2},
                {"temperature": 0.07},
                {"temperature": 0.15},
                {"temperature": 0.3},
            ),
        ),
        "Label smoothing": LossVariant(
            NTXentLoss,
            (
                {"temperature": 0.2, "label_smoothing": 0.3},
                {"temperature": 0.1, "label_smoothing": 0.1},
                {"temperature": 0.3, "label_smoothing": 0.5},
                {"temperature": 0.05, "label_smoothing": 0.1},
                {"temperature": 0.4, "label_smoothing": 0.5},
                {"temperature": 0.1, "label_smoothing": 0.3},
            ),
        ),
        "ASK": LossVariant(
            ReliabilityOTLoss,
            (
                {"temperature": 0.05},
                {"temperature": 0.03},
                {"temperature": 0.1},
                {"temperature": 0.07},
                {"temperature": 0.04},
                {"temperature": 0.2},
            ),
        ),
        "Teacher": LossVariant(
            KnowledgeDistillationLoss,
            (
                {"temperature": 0.2, "distillation_weight": 0.7},
                {"temperature": 0.1, "distillation_weight": 0.3},
                {"temperature": 0.15, "distillation_weight": 0.5},
                {"temperature": 0.3, "distillation_weight": 0.7},
                {"temperature": 0.05, "distillation_weight": 0.1},
                {"temperature": 0.25, "distillation_weight": 0.7},
            ),
        ),
        "Several positives": LossVariant(
            NTXentLoss,
            tuple(
                {"temperature": temperature, "positives": "same_clip"}
                for temperature in (0.1, 0.05, 0.2, 0.07, 0.15, 0.3)
            ),
        ),
        "Decoupled": LossVariant(
            NTXentLoss,
            tuple(
                {"temperature": temperature, "decoupled": True}
                for temperature in (0.1, 0.05, 0.2, 0.07, 0.15, 0.3)
            ),
        ),
        "Triplet": LossVariant(
            TripletLoss,
            (
                {"margin": 0.2, "negatives": "hardest"},
                {"margin": 0.2, "negatives": "all"},
                {"margin": 0.4, "negatives": "hardest"},
                {"margin": 0.4, "negatives": "all"},
                {"margin": 0.1, "negatives": "hardest"},
                {"margin": 0.6, "negatives": "all"},
            ),
        ),
        "Sigmoid": LossVariant(
            SigmoidLoss,
            (
                {"temperature": 0.1, "bias": -5.0},
                {"temperature": 0.1, "bias": -10.0},
                {"temperature": 0.2, "bias": -5.0},
                {"temperature": 0.05, "bias": -10.0},
                {"temperature": 0.2, "bias": -3.0},
                {"temperature": 0.1, "bias": -3.0},
            ),
        ),
        "Hard negatives": LossVariant(
            HardNegativeLoss,
            (
                {"temperature": 0.1, "hardness": 0.1},
                {"temperature": 0.05, "hardness": 0.1},
                {"temperature": 0.2, "hardness": 0.5},
                {"temperature": 0.2, "hardness": 0.1},
                {"temperature": 0.1, "hardness": 0.5},
                {"temperature": 0.3, "hardness": 1.0},
            ),
        ),
        "Momentum contrast": LossVariant(
            MomentumContrastLoss,
            (
                {"temperature": 0.1, "momentum": 0.99},
                {"temperature": 0.05, "momentum": 0.99},
                {"temperature": 0.2, "momentum": 0.99},
                {"temperature": 0.1, "momentum": 0.999},
                {"temperature": 0.15, "momentum": 0.99},
                {"temperature": 0.1, "momentum": 0.9},
            ),
        ),
        "Cross-batch memory": LossVariant(
            CrossBatchMemoryLoss,
            (
                {"temperature": 0.1, "memory_size": 1024},
                {"temperature": 0.05, "memory_size": 1024},
                {"temperature": 0.2, "memory_size": 1024},
                {"temperature": 0.1, "memory_size": 256},
                {"temperature": 0.15, "memory_size": 256},
                {"temperature": 0.1, "memory_size": 4096},
            ),
        ),
        "NNCLR": LossVariant(
            NearestNeighborContrastiveLoss,
            (
                {"temperature": 0.1, "support_size": 1024},
                {"temperature": 0.05, "support_size": 1024},
                {"temperature": 0.2, "support_size": 1024},
                {"temperature": 0.1, "support_size": 256},
                {"temperature": 0.15, "support_size": 1024},
                {"temperature": 0.1, "support_size": 2048},
            ),
        ),
        "Mined negatives": LossVariant(
            HardNegativeMiningLoss,
            (
                {"temperature": 0.1, "num_negatives": 8},
                {"temperature": 0.05, "num_negatives": 8},
                {"temperature": 0.2, "num_negatives": 8},
                {"temperature": 0.1, "num_negatives": 1},
                {"temperature": 0.15, "num_negatives": 8},
                {"temperature": 0.1, "num_negatives": 32},
            ),
        ),
    }
)
"""The losses of our comparisons by the names that they have in tables. Their settings were fixed before the
comparisons in the documentation ran."""

MAIN_LOSSES = ("NT-Xent", "Label smoothing", "ASK", "Teacher")
"""The losses that a short comparison shows."""

MAX_CANDIDATES = 8
"""The number of settings that each loss can be tried with."""


def loss_methods(
    variants: Mapping[str, LossVariant],
    make_model: Callable[[float], pl.LightningModule],
    *,
    learning_rate: float,
    num_candidates: int = MAX_CANDIDATES,
    refresh: Mapping[str, Any] = MappingProxyType({}),
) -> list[Method]:
    """The same model in the same seat, an `ASKModule`, with one loss after another.

    Args:
        variants: The losses by their names in tables, such as some of `LOSSES`.
        make_model: Function from a learning rate to a new model, which worker processes get by pickling.
            Batches have their clip ids under `"clip_id"`. An interaction of the model, its attribute
            `interaction`, is the loss's as well.
        learning_rate: Learning rate that suits the model, see `LossVariant.candidates`.
        num_candidates: Number of settings that each loss is tried with, in [1, 8].
        refresh: Arguments of `KnowledgeRefreshCallback` for the losses that need knowledge.

    Returns:
        The methods for `compare`.

    Raises:
        ValueError: An argument is outside its range.
    """
    return [
        Method(
            name,
            variant.candidates(learning_rate, num_candidates),
            partial(_build, variant, make_model, {**refresh, **variant.refresh}),
            description=_describe(variant),
        )
        for name, variant in variants.items()
    ]


def _describe(variant: LossVariant) -> dict[str, Any]:
    """What a variant differs in from others."""
    of_loss = inspect.signature(variant.loss).parameters
    refresh = {  # an option of both is not the same option
        f"refresh.{name}" if name in of_loss else name: value for name, value in variant.refresh.items()
    }
    callbacks = {"callbacks": list(variant.callbacks)} if variant.callbacks else {}
    return {"loss": variant.loss.__name__, **variant.options, **refresh, **callbacks}


def _build(
    variant: LossVariant,
    make_model: Callable[[float], pl.LightningModule],
    refresh: Mapping[str, Any],
    settings: Settings,
) -> ModuleAndCallbacks:
    """The module that trains with a loss, and the callbacks that the loss needs."""
    own = dict(settings)
    model = make_model(own.pop("learning_rate"))
    interaction = {}
    if find_interaction(model) is not None:
        if not variant.loss.takes_tokens:
            raise ValueError(
                f"{variant.loss.__name__} compares pooled embeddings, but {type(model).__name__} compares "
                "tokens by its interaction. Compare it with losses that take an interaction."
            )
        interaction = {"interaction": "interaction"}
    # Alike for all: an option of the settings alone makes another sample of a clip more than a negative.
    loss = variant.loss(**({"positives": "diagonal"} | interaction | dict(variant.options) | own))
    # Batches of other tasks need not have caption ids that nobody reads.
    finds_pairs = loss.needs_knowledge and row_finding_option(
        refresh.get("T", 15), refresh.get("write_back", False)
    )
    module = ASKModule(model, loss, ids="clip_id", caption_ids="caption_id" if finds_pairs else None)
    callbacks = [make() for make in variant.callbacks]
    if loss.needs_knowledge:
        refresher = KnowledgeRefreshCallback(save_knowledge=False, **refresh)
        callbacks = [refresher, DriftMonitor(), *callbacks]
    return module, callbacks
