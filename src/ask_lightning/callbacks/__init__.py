"""What runs beside the training loop: the refresh of the knowledge, and monitors."""

from ask_lightning.callbacks.monitors import DriftMonitor, InfluenceMonitor
from ask_lightning.callbacks.refresh import KnowledgeRefreshCallback

__all__ = ["DriftMonitor", "InfluenceMonitor", "KnowledgeRefreshCallback"]
