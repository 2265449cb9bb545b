"""The error for embeddings that are not finite, by which a diverged training is told from other faults."""


class NonFiniteEmbeddingsError(ValueError):
    """Embeddings contain NaN or Inf."""
