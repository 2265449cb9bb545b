"""What is remembered: the knowledge base, how it is searched, condensed and stored."""

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.pairs import Neighborhood, StoredPairs

__all__ = ["KnowledgeBase", "Neighborhood", "StoredPairs"]
