"""The protocol between a loss or metric and an interaction. Axes: `T` texts, `A` audios, `d` width."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ask_lightning.interaction.token_embeddings import Embeddings, TokenEmbeddings, pooled

MAX_ELEMENTS = 2**24
"""Default of the number of token–token scores that are held at a time: 64 MiB in float32."""


class Similarities(NamedTuple):
    """The similarities of texts and audios, one matrix for each direction of retrieval.

    Attributes:
        to_audio: `(T, A)`, row i holds how well each audio answers text i.
        to_text: `(A, T)`, row j holds how well each text answers audio j.
        are_symmetric: Whether `to_text` is the transpose of `to_audio`, because the interaction does not
            depend on which side asks.

    Examples:
        >>> similarities = Similarities(torch.tensor([[0.5, 0.1]]), torch.tensor([[0.4], [0.2]]))
        >>> similarities.to_text[0, 0]  # of the first text for the first audio
        tensor(0.4000)
    """

    to_audio: Tensor
    to_text: Tensor
    are_symmetric: bool = False


class Interaction(nn.Module, ABC):
    """How texts and audios are compared.

    What an interaction learns belongs to the model: make it an attribute of the model, so that the optimiser
    trains it and checkpoints hold it, and pass its name to the loss, `interaction="interaction"`.

    An interaction computes in float32 (float64 for float64 embeddings) whatever autocast is active. It does
    not normalise what it gets: losses and metrics bring embeddings to unit length before, and knowledge that
    is injected without renormalisation shall act as it is.

    Examples:
        >>> class Negative(Interaction):
        ...     needs_tokens = False
        ...     def similarities(self, text, audio):
        ...         return as_similarities(-torch.cdist(pooled(text), pooled(audio)))
        >>> Negative()(torch.eye(2), torch.eye(2)).to_audio
        tensor([[-0.0000, -1.4142],
                [-1.4142, -0.0000]])
    """

    needs_tokens: ClassVar[bool] = True
    """Whether both sides have to be `TokenEmbeddings`."""

    def forward(self, text: Embeddings, audio: Embeddings) -> Similarities:
        """Compare all texts with all audios.

        Args:
            text: Embeddings of T texts.
            audio: Embeddings of A audios, of the same width.

        Returns:
            The similarities in both directions.

        Raises:
            TypeError: A side has no tokens, and the interaction needs them.
        """
        for name, side in (("text", text), ("audio", audio)):
            if self.needs_tokens and not isinstance(side, TokenEmbeddings):
                raise TypeError(
                    f"{type(self).__name__} compares tokens, but the {name} embeddings are pooled, "
                    f"{tuple(side.shape)}. Have the encoder return TokenEmbeddings(pooled, tokens, mask), or "
                    "use DotProductInteraction()."
                )
        with torch.autocast(pooled(text).device.type, enabled=False):
            return self.similarities(text, audio)

    @abstractmethod
    def similarities(self, text: Any, audio: Any) -> Similarities:
        """Compute the similarities, outside of autocast.

        Args:
            text: Embeddings of T texts; `TokenEmbeddings` where `needs_tokens`.
            audio: Embeddings of A audios; `TokenEmbeddings` where `needs_tokens`.
        """


def as_similarities(scores: Any) -> Similarities:
    """The similarities in what an interaction returned.

    Args:
        scores: `Similarities`, or one matrix `(T, A)` that serves both directions.

    Raises:
        TypeError: It is neither.
        ValueError: The two matrices are not each other's transpose in shape.

    Examples:
        >>> as_similarities(torch.zeros(2, 3)).to_text.shape
        torch.Size([3, 2])
    """
    if not isinstance(scores, (Tensor, Similarities)):
        raise TypeError(
            "An interaction has to return a tensor (texts, audios), or Similarities, but got a "
            f"{type(scores).__name__}."
        )
    found = Similarities(scores, scores.T, are_symmetric=True) if isinstance(scores, Tensor) else scores
    if found.to_audio.ndim != 2 or found.to_text.shape != found.to_audio.shape[::-1]:
        raise ValueError(
            "An interaction has to return matrices (texts, audios) and (audios, texts), but got "
            f"{tuple(found.to_audio.shape)} and {tuple(found.to_text.shape)}."
        )
    return found
