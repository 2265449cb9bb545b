"""Metrics of audio–text retrieval: recall, mAP and median rank, both ways, several captions per clip."""

from ask_lightning.metrics.functional import RetrievalRanks, retrieval_ranks, retrieval_scores
from ask_lightning.metrics.retrieval import AudioTextRetrieval, RetrievalMetrics, retrieval_metrics

__all__ = [
    "AudioTextRetrieval",
    "RetrievalMetrics",
    "RetrievalRanks",
    "retrieval_metrics",
    "retrieval_ranks",
    "retrieval_scores",
]
