"""Metrics of audio–text retrieval both ways, with several captions per clip, and calibrated search."""

from ask_lightning.functional.calibration import Calibration
from ask_lightning.metrics.calibration import (
    CALIBRATIONS,
    HubCalibration,
    QueryBank,
    calibrated_ranks,
    choose_calibration,
)
from ask_lightning.metrics.functional import RetrievalRanks, retrieval_ranks, retrieval_scores
from ask_lightning.metrics.interaction import interaction_ranks
from ask_lightning.metrics.retrieval import AudioTextRetrieval

__all__ = [
    "CALIBRATIONS",
    "AudioTextRetrieval",
    "Calibration",
    "HubCalibration",
    "QueryBank",
    "RetrievalRanks",
    "calibrated_ranks",
    "choose_calibration",
    "interaction_ranks",
    "retrieval_ranks",
    "retrieval_scores",
]
