"""Callbacks: the refresh of the knowledge, and the monitors, tables and maps that report on a run."""

from ask_lightning.callbacks.auto_period import AutoPeriod
from ask_lightning.callbacks.cluster_signal import ClusterSignalCallback
from ask_lightning.callbacks.drift_map import DriftMap
from ask_lightning.callbacks.loader_state import LoaderStateCallback
from ask_lightning.callbacks.monitors import DriftMonitor, InfluenceMonitor
from ask_lightning.callbacks.query_table import QueryTable
from ask_lightning.callbacks.random_state import RandomStateCallback
from ask_lightning.callbacks.recall_table import RecallTable
from ask_lightning.callbacks.refresh import KnowledgeRefreshCallback
from ask_lightning.callbacks.search_calibration import SearchCalibration
from ask_lightning.knowledge.mapping import MappedRefresh

__all__ = [
    "AutoPeriod",
    "ClusterSignalCallback",
    "DriftMap",
    "DriftMonitor",
    "InfluenceMonitor",
    "KnowledgeRefreshCallback",
    "LoaderStateCallback",
    "MappedRefresh",
    "QueryTable",
    "RandomStateCallback",
    "RecallTable",
    "SearchCalibration",
]
