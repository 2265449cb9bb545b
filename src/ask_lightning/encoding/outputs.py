"""What counts as embeddings among the things that encoders return."""

from typing import Any

from torch import Tensor


def as_embeddings(output: Any, encoder: str) -> Tensor:
    """The `(B, d)` tensor in an encoder's output.

    Args:
        output: A tensor, or an output object of `transformers` with a `pooler_output`.
        encoder: The encoder's name, for the error.

    Returns:
        `(B, d)`.

    Raises:
        TypeError: Neither of them.
    """
    embeddings = getattr(output, "pooler_output", output)
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"`{encoder}` has to return a tensor (batch, width) of embeddings, but got a "
            f"{type(output).__name__}. Return the pooled embeddings, or pass a callable (model, batch)."
        )
    return embeddings
