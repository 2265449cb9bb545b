"""`CrossBatchMemoryLoss`: embeddings of earlier batches as further negatives. Axes: `B` batch, `d` width."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Positives, Temperature
from ask_lightning.losses.queued import QueuedLoss
from ask_lightning.utilities.arguments import check_count


class CrossBatchMemoryLoss(QueuedLoss):
    """NT-Xent whose negatives are the batch and the embeddings of the batches before it (XBM).

    Embeddings drift slowly once the first steps are over, so those of earlier steps stand in for what the
    present encoders would make of the same samples. With U, V the batch and Uᵐ, Vᵐ the memory, which has no
    gradient:

        L = ½ [ CE(V [U; Uᵐ]ᵀ / τ) + CE(U [V; Vᵐ]ᵀ / τ) ]

    References:
        Cross-batch memory, arXiv 1912.06798, which adds pairs of batch and memory to a pair-based loss; in
        NT-Xent they are further terms of the denominator.

    Recommendations:
        A memory larger than the training set holds each sample several times, at different ages.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        memory_size: Number of pairs in the memory, at least 1.
        start_step: Number of training batches, at least 0, before the memory is used and filled (warm-up);
            the paper has 1,000. Batches are counted, also where gradients are accumulated.
        positives: `"ids"`: other samples of the same clip, in the batch and in the memory, are left out of
            the denominator; needs ids. `"diagonal"`: they are negatives, a sample's own embedding of an
            earlier epoch among them.
        gather: `True`: the loss is over the batches of all ranks, with the gradient of one process that has
            them all. `False`: over the local batch. The memory is that of all ranks in either case.

    Attributes:
        last: Detached terms of the last call: `loss`; `queue_fill`, the share of the memory that is filled;
            `same_clip_in_queue`, the number of remembered pairs left out for a sample, mean over the batch.

    Examples:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 8, 16, generator=generator)
        >>> loss = CrossBatchMemoryLoss(memory_size=64, start_step=0)
        >>> first, second = (loss(audio, text, ids=range(8)), loss(audio, text, ids=range(8, 16)))
        >>> bool(second > first)  # eight more negatives
        True
    """

    def __init__(
        self,
        temperature: Temperature = 0.07,
        memory_size: int = 4096,
        *,
        start_step: int = 1000,
        positives: Positives = "ids",
        gather: bool = False,
    ) -> None:
        check_count("memory_size", memory_size)
        check_count("start_step", start_step, 0)
        super().__init__(memory_size, temperature, positives=positives, gather=gather)
        self.memory_size = memory_size
        self.start_step = start_step
        self._num_batches = 0

    def extra_repr(self) -> str:
        """The options of the memory."""
        return f"memory_size={self.memory_size}, start_step={self.start_step}"

    def reset(self) -> None:
        """Empty the memory and start the warm-up again."""
        super().reset()
        self._num_batches = 0

    def training_state(self) -> dict[str, Any]:
        """The memory, and the number of batches so far."""
        return super().training_state() | {"num_batches": self._num_batches}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on with the memory of another loss, see `RetrievalLoss`."""
        super().load_training_state(state)
        self._num_batches = state["num_batches"]

    def undo_batch(self) -> None:
        """Take the last batch out of the memory and out of the count, see `RetrievalLoss`."""
        super().undo_batch()
        self._num_batches -= 1

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms; in evaluation it is NT-Xent."""
        audio, text = self._rows_of_all_ranks(audio, text)  # (B, d)
        ids = None if ids is None else self._gathered(ids)
        loss, terms = self._contrast(audio, text, ids)
        if self.training:
            if self._num_batches >= self.start_step:
                self._remember(ids, audio=audio.detach(), text=text.detach())
            self._num_batches += 1
        return loss, terms
