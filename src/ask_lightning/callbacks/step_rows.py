"""What training steps tell of their rows in the knowledge: how far they have drifted, and what to store anew.

Axes: `n` samples of this rank, `d` width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ask_lightning.callbacks.auto_period import AutoSchedule
from ask_lightning.callbacks.step_embeddings import StepEmbeddings, StepRecorder
from ask_lightning.encoding.target import Target
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.row_matching import match_rows, repeated_pairs
from ask_lightning.utilities.distributed import Ranks


class StepRows:
    """Measures the drift of the rows of each training step, or stores its embeddings over them.

    Args:
        target: The loss of the training steps, which is given a hook, and the ids of their batches.
        option: The option that finds rows, as it is written.
        schedule: What takes the drift into account; `None` where it is not measured.
        writes_back: Whether to store the embeddings.

    Attributes:
        is_used: Whether the rows of the last step that began have been made use of.
    """

    def __init__(
        self, target: Target, option: str, schedule: AutoSchedule | None, *, writes_back: bool
    ) -> None:
        self.is_used = True
        self._option, self._schedule, self._writes_back = option, schedule, writes_back
        self._has_caption_ids = target.pair_ids is not None
        self._recorder = StepRecorder(target, option)
        self._batch: Any = None  # of the present step
        self._step = 0  # number of optimiser steps before it
        self._num_steps = self._num_written = 0
        self._warned_of_captions = False

    def remove_hook(self) -> None:
        """Take the hook off the loss; the step that it has seen last may still be ended."""
        self._recorder.remove()

    def check_knowledge(self, base: KnowledgeBase) -> None:
        """Check that the rows of samples are found in new knowledge.

        Args:
            base: The knowledge.

        Raises:
            RuntimeError: Two pairs have one clip and one caption, or rows are written back and several pairs
                of a clip cannot be told apart. Where drift is measured there is a warning instead.
        """
        problem = check_pairs(base, self._option, has_caption_ids=self._has_caption_ids)
        if problem is None:
            return
        if self._writes_back:  # to another pair's row, which would be lost
            raise RuntimeError(problem)
        if not self._warned_of_captions:
            self._warned_of_captions = True
            rank_zero_warn(
                f"{problem} Until then the nearest caption that is stored of the clip is compared, often "
                "another one, so the drift comes out too small."
            )

    def begin(self, batch: Any, step: int) -> None:
        """Note that a step begins.

        Args:
            batch: Its batch.
            step: Number of optimiser steps before it.
        """
        self.is_used, self._batch, self._step = False, batch, step

    def end(self, base: KnowledgeBase, ranks: Ranks) -> Tensor | None:
        """Make use of the rows of the step that has ended; collective.

        Args:
            base: The knowledge in use.
            ranks: The processes of the run.

        Returns:
            Global numbers of the rows that were stored, the same on all ranks; `None` where none is stored.
        """
        batch, self._batch, self.is_used = self._batch, None, True
        step = self._recorder.take(base, batch)
        self._num_steps += 1
        if self._schedule is not None:
            step, stored = stored_embeddings(base, step)
            self._schedule.add((step.audio, step.text), stored, step=self._step)
        if not self._writes_back:
            return None
        rows = write_back(base, step, ranks)
        self._num_written += len(rows)
        return rows

    def check_found(self, drift: float) -> None:
        """Check at the end of an epoch that the steps have found rows.

        Args:
            drift: What the schedule has measured; NaN for nothing.

        Raises:
            RuntimeError: No row of any step is in the knowledge.
        """
        if self._schedule is not None:
            has_found = not math.isnan(drift) or not self._schedule.num_batches
        else:
            has_found = bool(self._num_written or not self._num_steps)
        if has_found:
            return
        what, names = "clips", "clip ids"
        if self._has_caption_ids:
            what, names = "pairs", "clip ids and caption ids"
        raise RuntimeError(
            f"KnowledgeRefreshCallback({self._option}) compares training batches with what is stored of "
            f"their {what}, but the knowledge has none of them. Leave `source` out, or pass a source with "
            f"the {names} of the training data."
        )


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
