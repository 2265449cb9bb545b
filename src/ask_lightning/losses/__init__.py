"""The losses that `ASKModule` can train with, one in each file."""

from ask_lightning.losses.base import RetrievalLoss
from ask_lightning.losses.cross_batch_memory import CrossBatchMemoryLoss
from ask_lightning.losses.hard_negative import HardNegativeLoss
from ask_lightning.losses.hard_negative_mining import HardNegativeMiningLoss
from ask_lightning.losses.knowledge_distillation import KnowledgeDistillationLoss
from ask_lightning.losses.momentum_contrast import MomentumContrastLoss
from ask_lightning.losses.nearest_neighbor_contrastive import NearestNeighborContrastiveLoss
from ask_lightning.losses.nt_xent import NTXentLoss
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from ask_lightning.losses.sigmoid import SigmoidLoss
from ask_lightning.losses.triplet import TripletLoss

__all__ = [
    "CrossBatchMemoryLoss",
    "HardNegativeLoss",
    "HardNegativeMiningLoss",
    "KnowledgeDistillationLoss",
    "MomentumContrastLoss",
    "NTXentLoss",
    "NearestNeighborContrastiveLoss",
    "ReliabilityOTLoss",
    "RetrievalLoss",
    "SigmoidLoss",
    "TripletLoss",
]
