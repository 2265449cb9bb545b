"""The embeddings in the output of an encoder."""

from typing import Any

from torch import Tensor

from ask_lightning.interaction import Embeddings, TokenEmbeddings, pooled


def as_encoded(output: Any, encoder: str) -> Embeddings:
    """The embeddings in an encoder's output, with those of tokens where it has them.

    Args:
        output: Tensor, `TokenEmbeddings`, or output object of `transformers` with a `pooler_output`.
        encoder: Name of the encoder, for the message.

    Returns:
        `(B, d)` embeddings, or `TokenEmbeddings`.

    Raises:
        TypeError: The output is none of them.
    """
    embeddings = getattr(output, "pooler_output", output)
    if not isinstance(embeddings, Tensor | TokenEmbeddings):
        raise TypeError(
            f"`{encoder}` has to return a tensor (batch, width) of embeddings, or TokenEmbeddings, but got a "
            f"{type(output).__name__}. Return the pooled embeddings, or pass a callable (model, batch)."
        )
    return embeddings


def as_embeddings(output: Any, encoder: str) -> Tensor:
    """The `(B, d)` tensor in an encoder's output.

    Args:
        output: Tensor, `TokenEmbeddings`, or output object of `transformers` with a `pooler_output`.
        encoder: Name of the encoder, for the message.

    Returns:
        `(B, d)` embeddings.

    Raises:
        TypeError: The output is none of them.
    """
    return pooled(as_encoded(output, encoder))
