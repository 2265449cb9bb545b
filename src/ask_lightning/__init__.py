"""Audio–text retrieval training with ASK for any PyTorch Lightning model (arXiv 2512.19703)."""

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
