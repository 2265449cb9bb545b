"""The embeddings in the output of an encoder."""

from typing import Any

from torch import Tensor


def as_embeddings(output: Any, encoder: str) -> Tensor:
    """The `(B, d)` tensor in an encoder's output.

    Args:
        output: Tensor, or output object of `transformers` with a `pooler_output`.
        encoder: Name of the encoder, for the message.

    Returns:
        `(B, d)` embeddings.

    Raises:
        TypeError: The output is neither of them.
    """
    embeddings = getattr(output, "pooler_output", output)
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"`{encoder}` has to return a tensor (batch, width) of embeddings, but got a "
            f"{type(output).__name__}. Return the pooled embeddings, or pass a callable (model, batch)."
        )
    return embeddings
