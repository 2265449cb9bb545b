"""What losses with a queue of earlier batches have in common.

Axes: `B` batch, `n` rows in the queue, `d` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ask_lightning.functional.contrastive import nt_xent
from ask_lightning.losses.base import Positives, RetrievalLoss, Temperature
from ask_lightning.losses.embedding_queue import EmbeddingQueue
from ask_lightning.utilities.distributed import Ranks


class QueuedLoss(RetrievalLoss):
    """A loss that needs no knowledge base, but remembers embeddings of earlier training batches.

    On several ranks the queue takes the rows of all of them, in the order of ranks, so that it is the same
    everywhere and each step makes it older by the global batch; `gather` decides only over which batch the
    loss is computed. In evaluation mode the queue is neither read nor written to.

    Args:
        queue_size: Largest number of pairs to remember.
        temperature: τ > 0, see `RetrievalLoss`.
        positives: `"diagonal"` or `"ids"`, see `RetrievalLoss`; it holds for rows of the queue, too.
        gather: Whether the loss is over the batches of all ranks.
    """

    needs_knowledge = False
    contrasts_batch_only = False

    def __init__(
        self, queue_size: int, temperature: Temperature, *, positives: Positives, gather: bool
    ) -> None:
        super().__init__(temperature, positives=positives, gather=gather)
        self._queue = EmbeddingQueue(queue_size)

    def reset(self) -> None:
        """Empty the queue."""
        self._queue.clear()

    def training_state(self) -> dict[str, Any]:
        """The rows of the queue."""
        return {"queue": self._queue.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over the rows of a queue, see `RetrievalLoss`."""
        self._queue.load_state_dict(state["queue"])

    def undo_batch(self) -> None:
        """Take the rows of the last batch out of the queue, see `RetrievalLoss`."""
        self._queue.undo_push()

    def _remember(self, ids: Tensor | None, **rows: Tensor) -> None:
        """Let the batch enter the queue.

        Args:
            ids: `(B,)`, the clips of the rows.
            rows: `(B, d)` each, over the batch for which the loss is computed.
        """
        columns = rows if ids is None else rows | {"ids": ids}
        if not self._gathers_ranks:
            columns = {name: torch.cat(Ranks.current().all_gather(side)) for name, side in columns.items()}
        self._queue.push(**columns)

    def _contrast(
        self,
        audio: Tensor,
        text: Tensor,
        ids: Tensor | None,
        *,
        audio_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent in both directions, in training with the queue's rows among the negatives.

        Args:
            audio: `(B, d)`, the audio queries.
            text: `(B, d)`, the text queries.
            ids: `(B,)`, the clips of the batch.
            audio_keys: `(B, d)`, the candidates of the batch for a text; default `audio`.
            text_keys: `(B, d)`, the candidates of the batch for an audio; default `text`.

        Returns:
            The loss, 0-d, and its terms `loss`, `queue_fill` and `same_clip_in_queue`.
        """
        to_audio = audio if audio_keys is None else audio_keys
        to_text = text if text_keys is None else text_keys
        ignore = None
        if self.training:
            to_audio = torch.cat([to_audio, self._queue.column("audio", like=audio)])  # (B + n, d)
            to_text = torch.cat([to_text, self._queue.column("text", like=text)])
        if self.positives == "ids" and ids is not None:
            clips = torch.cat([ids, self._queue.column("ids", like=ids)]) if self.training else ids
            ignore = ids[:, None] == clips  # (B, B + n)
        loss = 0.5 * (
            nt_xent(text @ to_audio.T, self.temperature, ignore=ignore)
            + nt_xent(audio @ to_text.T, self.temperature, ignore=ignore)
        )
        left_out = torch.zeros_like(loss) if ignore is None else ignore[:, len(audio) :].sum() / len(audio)
        return loss, {"loss": loss, "same_clip_in_queue": left_out, **self._fill(loss)}

    def _fill(self, like: Tensor) -> dict[str, Tensor]:
        """The term `queue_fill`."""
        return {"queue_fill": torch.full_like(like.detach(), len(self._queue) / self._queue.size)}
