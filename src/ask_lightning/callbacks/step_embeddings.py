"""The embeddings that training steps make anyway, caught where they enter the loss.

Axes: `n` samples of this rank, `d` width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ask_lightning.encoding.target import Target
from ask_lightning.functional.injection import unit_length
from ask_lightning.interaction import Embeddings, pooled
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Ids
from ask_lightning.utilities.clip_ids import integer_ids


@dataclass(frozen=True)
class StepEmbeddings:
    """The samples of a training step, without gradient.

    Attributes:
        ids: `(n,)` int64, their clips.
        audio: `(n, d)`, unit vectors.
        text: `(n, d)`, unit vectors.
        caption_ids: `(n,)` int64, their captions; `None` where captions have no ids.
    """

    ids: Tensor
    audio: Tensor
    text: Tensor
    caption_ids: Tensor | None = None

    def select(self, which: Tensor) -> StepEmbeddings:
        """Some of the samples.

        Args:
            which: Boolean mask `(n,)`, or numbers of the samples.
        """
        captions = None if self.caption_ids is None else self.caption_ids[which]
        return StepEmbeddings(self.ids[which], self.audio[which], self.text[which], captions)


class StepRecorder:
    """Keeps what the loss was last called with while it trains.

    Args:
        target: The loss of the training steps, and the ids of their batches.
        option: What needs the recorder, for a message.
    """

    def __init__(self, target: Target, option: str) -> None:
        self._option, self._pair_ids = option, target.pair_ids
        self._recorded: StepEmbeddings | None = None
        self._hook: RemovableHandle | None = target.loss.register_forward_hook(self._record, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the loss."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def take(self, base: KnowledgeBase, batch: Any) -> StepEmbeddings:
        """The samples of the step that has ended, without those that have overflowed; each is given out once.

        Args:
            base: The knowledge in use, which gives a step without samples its width, dtype and device.
            batch: The batch of the step, which tells its captions.

        Raises:
            RuntimeError: The batch holds other samples than those that the loss was called with.
        """
        recorded, self._recorded = self._recorded, None
        if recorded is None:  # a batch of a single pair, or one that the training step has skipped
            nothing = base.coarse.audio.new_empty(0, base.width, dtype=torch.float32)
            no_ids = torch.empty(0, dtype=torch.int64, device=base.device)
            return StepEmbeddings(no_ids, nothing, nothing, None if self._pair_ids is None else no_ids)
        if self._pair_ids is not None:
            recorded = replace(recorded, caption_ids=self._captions_of(recorded, *self._pair_ids(batch)))
        return recorded.select((recorded.audio + recorded.text).isfinite().all(dim=1))

    def _captions_of(self, recorded: StepEmbeddings, ids: Ids | None, caption_ids: Ids | None) -> Tensor:
        """The captions of the recorded samples, which have to be those of the batch."""
        captions = integer_ids(() if caption_ids is None else caption_ids, name="caption_ids")
        clips = recorded.ids if ids is None else integer_ids(ids).to(recorded.ids.device)
        if len(captions) != len(recorded.ids) or not torch.equal(clips, recorded.ids):
            raise RuntimeError(
                f"KnowledgeRefreshCallback({self._option}) takes the captions of a step's samples from its "
                f"batch, which has {len(captions)}, but the loss was last called with {len(recorded.ids)} "
                "samples, other ones or in another order. Call the loss once in a step, with all samples of "
                "the batch in its order."
            )
        return captions.to(recorded.ids.device)

    @torch.no_grad()
    def _record(
        self, loss: nn.Module, embeddings: tuple[Embeddings, ...], named: dict[str, Any], value: Tensor
    ) -> None:
        """Note the embeddings of one evaluation of the loss; a forward hook."""
        if not loss.training:
            return
        arguments = dict(zip(("audio", "text"), embeddings, strict=False)) | named
        ids: Ids | None = arguments.get("ids")
        if ids is None:
            raise RuntimeError(
                f"KnowledgeRefreshCallback({self._option}) finds the rows of a batch by their clip ids, but "
                "the loss is called without any. Pass them: ASKModule(..., ids=...), or loss(audio, text, "
                "ids=...)."
            )
        audio, text = (unit_length(pooled(arguments[side]).detach().float()) for side in ("audio", "text"))
        self._recorded = StepEmbeddings(integer_ids(ids).to(audio.device), audio, text)
