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
from ask_lightning.knowledge.row_matching import match_rows, repeated_pairs
from ask_lightning.losses.base import Ids
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks


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
        rows = match_rows(base, step.ids, step.text, step.caption_ids)
        audio, text = base.fine.pairs(rows.clamp(min=0))
        known = rows >= 0
    return step.select(known), (audio[known].float(), text[known].float())


def check_pairs(base: KnowledgeBase, option: str, *, has_caption_ids: bool) -> str | None:
    """Refuse knowledge in which the rows of a sample cannot be told from others.

    Args:
        base: The knowledge.
        option: The option that finds rows, as it is written.
        has_caption_ids: Whether the captions of batches are known.

    Returns:
        What is known too little of several pairs of a clip; `None` where every row is found.

    Raises:
        RuntimeError: Two pairs have one clip and one caption.
    """
    if base.training_clips is not None:  # whole clips are compared
        return None
    name = f"KnowledgeRefreshCallback({option})"
    if has_caption_ids and base.caption_ids is not None:
        repeated = repeated_pairs(base)
        if len(repeated):
            raise RuntimeError(
                f"{name} finds the row of a sample by its clip and its caption, but {len(repeated)} of the "
                f"{len(base.ids)} pairs of the knowledge, the first of them row {int(repeated[0])}, have the "
                "clip id and the caption id of a pair before them. Caption ids have to differ within a clip, "
                "and the source has to hold each pair once."
            )
        return None
    counts = base.ids.unique(return_counts=True)[1]
    several = int((counts > 1).sum())
    if not several:
        return None
    return (
        f"{name} finds the row of a sample by its clip id, but {several} of the {len(counts)} clips in the "
        f"knowledge have several pairs, up to {int(counts.max())}, which clip ids do not tell apart. Pass "
        "the ids of the captions: ASKModule(..., caption_ids=...)."
    )


@torch.no_grad()
def write_back(base: KnowledgeBase, step: StepEmbeddings, ranks: Ranks) -> Tensor:
    """Store the samples of all ranks' steps over what is stored of them; collective.

    Args:
        base: The knowledge in use, with caption ids or one pair for each clip.
        step: The samples of this rank.
        ranks: The processes of the run.

    Returns:
        Global numbers of the rows that were replaced, the same on all ranks; a number may occur twice.
    """
    rows = match_rows(base, step.ids, step.text, step.caption_ids)
    known = rows >= 0
    step, rows = step.select(known), rows[known]
    # Each rank finds the rows of its own samples, so that all write the same whatever their devices round.
    counts = ranks.all_gather_count(len(rows), rows.device)
    sides = torch.cat([step.audio, step.text], dim=1)  # (n, 2 d)
    rows, sides = (torch.cat(ranks.all_gather(part, counts)) for part in (rows, sides))
    audio, text = sides.chunk(2, dim=1)
    base.replace_rows(rows, audio, text)
    return rows
