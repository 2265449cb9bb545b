"""What a run shows of itself: recall tables, drift maps, queries; as files and in the loggers."""

from ask_lightning.tracking.drift_map import DriftMap
from ask_lightning.tracking.query_table import QueryTable
from ask_lightning.tracking.recall_table import RecallTable

__all__ = ["DriftMap", "QueryTable", "RecallTable"]
