"""Similarity of texts and audios from their tokens: what an encoder returns for it, and how it is scored."""

from ask_lightning.interaction.base import Interaction, Similarities, as_similarities
from ask_lightning.interaction.cross_attention import StackedCrossAttention, attended_similarity
from ask_lightning.interaction.dot_product import DotProductInteraction
from ask_lightning.interaction.frame_wise import FrameWiseInteraction, frame_similarity
from ask_lightning.interaction.late import LateInteraction, late_similarity
from ask_lightning.interaction.prototype_attention import PrototypeAttention, prototype_similarity
from ask_lightning.interaction.rows import joined, rows_of, with_padding, without_padding
from ask_lightning.interaction.token_embeddings import Embeddings, TokenEmbeddings, pooled, unit_embeddings

__all__ = [
    "DotProductInteraction",
    "Embeddings",
    "FrameWiseInteraction",
    "Interaction",
    "LateInteraction",
    "PrototypeAttention",
    "Similarities",
    "StackedCrossAttention",
    "TokenEmbeddings",
    "as_similarities",
    "attended_similarity",
    "frame_similarity",
    "joined",
    "late_similarity",
    "pooled",
    "prototype_similarity",
    "rows_of",
    "unit_embeddings",
    "with_padding",
    "without_padding",
]
