"""Retrieval models to train with ASK, or without."""

from ask_lightning.models.tiny import TinyRetriever

__all__ = ["TinyRetriever"]
