"""The embeddings that training steps make anyway, caught where they enter the loss.

Axes: `n` samples of this rank, `d` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ask_lightning.functional.injection import unit_length
from ask_lightning.interaction import Embeddings, pooled
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.row_matching import match_rows
from ask_lightning.losses.base import Ids, RetrievalLoss
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks


@dataclass(frozen=True)
class StepEmbeddings:
    """The samples of a training step, without gradient.

    Attributes:
        ids: `(n,)` int64, their clips.
        audio: `(n, d)`, unit vectors.
        text: `(n, d)`, unit vectors.
    """

    ids: Tensor
    audio: Tensor
    text: Tensor

    def select(self, which: Tensor) -> StepEmbeddings:
        """Some of the samples.

        Args:
            which: Boolean mask `(n,)`, or numbers of the samples.
        """
        return StepEmbeddings(self.ids[which], self.audio[which], self.text[which])


class StepRecorder:
    """Keeps what the loss was last called with while it trains.

    Args:
        loss: The loss of the training steps.
        option: What needs the recorder, for a message.
    """

    def __init__(self, loss: RetrievalLoss, option: str) -> None:
        self._option = option
        self._recorded: StepEmbeddings | None = None
        self._hook: RemovableHandle | None = loss.register_forward_hook(self._record, with_kwargs=True)

    def remove(self) -> None:
        """Take the hook off the loss."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def take(self, base: KnowledgeBase) -> StepEmbeddings:
        """The samples of the step that has ended, without those that have overflowed; each is given out once.

        Args:
            base: The knowledge in use, which gives a step without samples its width, dtype and device.
        """
        recorded, self._recorded = self._recorded, None
        if recorded is None:  # a batch of a single pair, or one that the training step has skipped
            nothing = base.coarse.audio.new_empty(0, base.width, dtype=torch.float32)
            return StepEmbeddings(torch.empty(0, dtype=torch.int64, device=base.device), nothing, nothing)
        return recorded.select((recorded.audio + recorded.text).isfinite().all(dim=1))

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


@torch.no_grad()
def stored_embeddings(
    base: KnowledgeBase, step: StepEmbeddings
) -> tuple[StepEmbeddings, tuple[Tensor, Tensor]]:
    """Find what is stored of a step's samples; collective where the base is sharded.

    Args:
        base: The knowledge in use. If it holds training clips beside pairs of another source, they are what
            is compared, all captions of a clip as one.
        step: The samples.

    Returns:
        The samples that are stored, and their stored audio and text `(n, d)`, float32.
    """
    if base.training_clips is not None:
        clips = base.find_clips(step.ids)
        audio, text, known = clips.audio, clips.text, clips.known
    else:
        rows = match_rows(base, step.ids, step.text)
        audio, text = base.fine.pairs(rows.clamp(min=0))
        known = rows >= 0
    return step.select(known), (audio[known].float(), text[known].float())


def check_single_pairs(base: KnowledgeBase) -> None:
    """Refuse to write back to knowledge that holds several pairs of a clip.

    Which of them a sample is could be told by the nearest stored caption alone. An encoder that is still to
    learn takes more than half of them for another one, whose row would then be lost.

    Args:
        base: The knowledge.

    Raises:
        RuntimeError: A clip has several pairs.
    """
    counts = base.ids.unique(return_counts=True)[1]
    several = int((counts > 1).sum())
    if several:
        raise RuntimeError(
            "KnowledgeRefreshCallback(write_back=True) finds the row of a sample by its clip id, but "
            f"{several} of the {len(counts)} clips in the knowledge have several pairs, up to "
            f"{int(counts.max())}, which clip ids do not tell apart. Renew them by "
            'KnowledgeRefreshCallback(5), mode="rolling" or T="auto".'
        )


@torch.no_grad()
def write_back(base: KnowledgeBase, step: StepEmbeddings, ranks: Ranks) -> Tensor:
    """Store the samples of all ranks' steps over what is stored of them; collective.

    Args:
        base: The knowledge in use, with one pair for each clip.
        step: The samples of this rank.
        ranks: The processes of the run.

    Returns:
        Global numbers of the rows that were replaced, the same on all ranks; a number may occur twice.
    """
    rows = match_rows(base, step.ids, step.text)
    known = rows >= 0
    step, rows = step.select(known), rows[known]
    # Each rank finds the rows of its own samples, so that all write the same whatever their devices round.
    counts = ranks.all_gather_count(len(rows), rows.device)
    sides = torch.cat([step.audio, step.text], dim=1)  # (n, 2 d)
    rows, sides = (torch.cat(ranks.all_gather(part, counts)) for part in (rows, sides))
    audio, text = sides.chunk(2, dim=1)
    base.replace_rows(rows, audio, text)
    return rows
