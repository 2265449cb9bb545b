"""The knowledge base: its pairs and prototypes, how they are searched, sharded and stored."""

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.pairs import Neighborhood, StoredPairs

__all__ = ["KnowledgeBase", "Neighborhood", "StoredPairs"]
