"""Audio–text retrieval training with ASK for any PyTorch Lightning model (arXiv 2512.19703)."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ask_lightning.callbacks import DriftMonitor, InfluenceMonitor, KnowledgeRefreshCallback
    from ask_lightning.knowledge import KnowledgeBase, Neighborhood
    from ask_lightning.losses import (
        HardNegativeLoss,
        KnowledgeDistillationLoss,
        NTXentLoss,
        ReliabilityOTLoss,
        SigmoidLoss,
        TripletLoss,
    )
    from ask_lightning.module import ASKModule

__version__ = "0.1.0"

__all__ = [
    "ASKModule",
    "DriftMonitor",
    "HardNegativeLoss",
    "InfluenceMonitor",
    "KnowledgeBase",
    "KnowledgeDistillationLoss",
    "KnowledgeRefreshCallback",
    "NTXentLoss",
    "Neighborhood",
    "ReliabilityOTLoss",
    "SigmoidLoss",
    "TripletLoss",
]

_MODULES = {
    "ASKModule": "module",
    "DriftMonitor": "callbacks",
    "HardNegativeLoss": "losses",
    "InfluenceMonitor": "callbacks",
    "KnowledgeBase": "knowledge",
    "KnowledgeDistillationLoss": "losses",
    "KnowledgeRefreshCallback": "callbacks",
    "NTXentLoss": "losses",
    "Neighborhood": "knowledge",
    "ReliabilityOTLoss": "losses",
    "SigmoidLoss": "losses",
    "TripletLoss": "losses",
}


def __getattr__(name: str) -> Any:
    """Import names when they are first used, so that the command line can answer before torch is there."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
