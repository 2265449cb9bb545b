"""Metrics of audio–text retrieval: recall, mAP and median rank, both ways, with several captions per clip."""

from ask_lightning.metrics.functional import RetrievalRanks, retrieval_ranks, retrieval_scores
from ask_lightning.metrics.retrieval import AudioTextRetrieval

__all__ = [
    "AudioTextRetrieval",
    "RetrievalRanks",
    "retrieval_ranks",
    "retrieval_scores",
]
