"""The losses that our comparisons train one model with, and the settings that each is tried with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl

from ask_lightning.callbacks import DriftMonitor, KnowledgeRefreshCallback
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
from ask_lightning.utilities.arguments import check_choice, check_positive, check_range

# In each list first what separates most, so that a short comparison takes the first few; the last two of
# the eight are the first again, at other learning rates.
_GRIDS: dict[str, tuple[type[RetrievalLoss], tuple[dict[str, Any], ...]]] = {
    "NT-Xent": (
        NTXentLoss,
        (
            {"temperature": 0.1},
            {"temperature": 0.05},
            {"temperature": 0.2},
            {"temperature": 0.07},
            {"temperature": 0.15},
            {"temperature": 0.03},
        ),
    ),
    "Label smoothing": (
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
    "ASK": (
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
    "Teacher": (
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
    "Several positives": (
        NTXentLoss,
        tuple(
            {"temperature": temperature, "positives": "same_clip"}
            for temperature in (0.1, 0.05, 0.2, 0.07, 0.15, 0.03)
        ),
    ),
    "Decoupled": (
        NTXentLoss,
        tuple(
            {"temperature": temperature, "decoupled": True}
            for temperature in (0.1, 0.05, 0.2, 0.07, 0.15, 0.03)
        ),
    ),
    "Triplet": (
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
    "Sigmoid": (
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
    "Hard negatives": (
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
    "Momentum contrast": (
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
    "Cross-batch memory": (
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
    "NNCLR": (
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
    "Mined negatives": (
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
_LEARNING_RATE_FACTORS = (0.5, 2.0)

LOSSES: Mapping[str, type[RetrievalLoss]] = MappingProxyType(
    {name: kind for name, (kind, _) in _GRIDS.items()}
)
"""The losses of our comparisons by the names that they have in tables."""

MAIN_LOSSES = ("NT-Xent", "Label smoothing", "ASK", "Teacher")
"""The losses that a short comparison shows."""

MAX_CANDIDATES = 8
"""The number of settings that `candidates` knows for each loss."""


def candidates(loss: str, learning_rate: float, count: int = MAX_CANDIDATES) -> tuple[Settings, ...]:
    """The settings that a loss is tried with.

    They were fixed before the comparisons in the documentation ran, and are as many for each loss: six sets
    of the loss's own knobs at the given learning rate, then the first set at half and at twice of it.

    Args:
        loss: Name of the loss, a key of `LOSSES`.
        learning_rate: Learning rate that suits the model, above 0.
        count: Number of settings, in [1, 8].

    Returns:
        Settings with a `learning_rate` and arguments of the loss.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> candidates("NT-Xent", 1e-3, count=2)
        ({'temperature': 0.1, 'learning_rate': 0.001}, {'temperature': 0.05, 'learning_rate': 0.001})
    """
    check_choice("loss", loss, tuple(LOSSES))
    check_positive("learning_rate", learning_rate)
    check_range("count", count, 1, MAX_CANDIDATES)
    _, grid = _GRIDS[loss]
    settings = [own | {"learning_rate": learning_rate} for own in grid]
    settings += [grid[0] | {"learning_rate": factor * learning_rate} for factor in _LEARNING_RATE_FACTORS]
    return tuple(settings[:count])


def loss_methods(
    losses: Sequence[str],
    make_model: Callable[[float], pl.LightningModule],
    *,
    learning_rate: float,
    num_candidates: int = MAX_CANDIDATES,
    refresh: Mapping[str, Any] = MappingProxyType({}),
) -> list[Method]:
    """The same model in the same seat, an `ASKModule`, with one loss after another.

    Args:
        losses: Names of the losses, keys of `LOSSES`.
        make_model: Function from a learning rate to a new model, which worker processes get by pickling.
            Batches have their clip ids under `"clip_id"`.
        learning_rate: Learning rate that suits the model, see `candidates`.
        num_candidates: Number of settings that each loss is tried with.
        refresh: Arguments of `KnowledgeRefreshCallback` for the losses that need knowledge.

    Returns:
        The methods for `compare`.
    """
    return [
        Method(
            name,
            candidates(name, learning_rate, num_candidates),
            partial(_build, name, make_model, dict(refresh)),
        )
        for name in losses
    ]


def _build(
    name: str,
    make_model: Callable[[float], pl.LightningModule],
    refresh: Mapping[str, Any],
    settings: Settings,
) -> ModuleAndCallbacks:
    """The module that trains with a loss, and the callbacks that the loss needs."""
    options = dict(settings)
    model = make_model(options.pop("learning_rate"))
    # Alike for all: an option of the settings alone makes another sample of a clip more than a negative.
    loss = LOSSES[name](**({"positives": "diagonal"} | options))
    module = ASKModule(model, loss, ids="clip_id")
    if not loss.needs_knowledge:
        return module, []
    return module, [KnowledgeRefreshCallback(save_knowledge=False, **refresh), DriftMonitor()]
