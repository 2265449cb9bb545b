"""What is remembered: the knowledge base, how it is searched, condensed, encoded and stored."""

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.pairs import Granularity, Neighborhood

__all__ = ["Granularity", "KnowledgeBase", "Neighborhood"]
