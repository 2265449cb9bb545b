"""`DotProductInteraction`: the similarity of pooled embeddings."""

from typing import ClassVar

from ask_lightning.interaction.base import Interaction, Similarities, as_similarities
from ask_lightning.interaction.token_embeddings import Embeddings, pooled
from ask_lightning.utilities.dtypes import computation_dtype


class DotProductInteraction(Interaction):
    """The dot product of pooled embeddings, which losses and metrics use by default; tokens play no part.

    Examples:
        >>> import torch
        >>> DotProductInteraction()(torch.eye(2), torch.eye(2)).to_audio
        tensor([[1., 0.],
                [0., 1.]])
    """

    needs_tokens: ClassVar[bool] = False

    def similarities(self, text: Embeddings, audio: Embeddings) -> Similarities:
        """One matrix for both directions."""
        rows, columns = pooled(text), pooled(audio)
        dtype = computation_dtype(rows)
        return as_similarities(rows.to(dtype) @ columns.to(dtype).T)
