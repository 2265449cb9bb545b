"""What `ASKModule` can train with; one loss a file."""

from ask_lightning.losses.base import RetrievalLoss
from ask_lightning.losses.knowledge_distillation import KnowledgeDistillationLoss
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss

__all__ = ["KnowledgeDistillationLoss", "ReliabilityOTLoss", "RetrievalLoss"]
