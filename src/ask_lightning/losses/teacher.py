"""Stored knowledge as the teacher of a loss. Axes: `B` batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ask_lightning.functional.distillation import Teacher, teacher_targets
from ask_lightning.functional.entropy import row_entropy
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.utilities.arguments import check_choice, check_positive, check_range


@dataclass(frozen=True)
class BatchTargets:
    """Soft targets of a batch.

    Attributes:
        t2a: `(B, B)`, the targets of each text among the audios.
        a2t: `(B, B)`, the targets of each audio among the texts.
        known: `(B,)` boolean, whether the knowledge holds the sample's clip.
    """

    t2a: Tensor
    a2t: Tensor
    known: Tensor

    def terms(self) -> dict[str, Tensor]:
        """Terms for the log: entropy in nats and mean diagonal of the targets, unknown and known clips."""
        both = torch.stack([self.t2a, self.a2t])  # (2, B, B)
        unknown = (~self.known).sum().to(both.dtype)
        return {
            "target_entropy": row_entropy(both).mean(),
            "target_diagonal": both.diagonal(dim1=1, dim2=2).mean(),
            "unknown_clips": unknown,
            "known_clips": len(self.known) - unknown,
        }


@dataclass(frozen=True)
class StoredTeacher:
    """The teacher that stored knowledge is, with the options of a loss.

    Args:
        distillation_weight: α in [0, 1], the teacher's share of the targets.
        temperature: τ_t > 0.
        form: `"softmax"` or `"transport"`, see `teacher_targets`.
    """

    distillation_weight: float
    temperature: float
    form: Teacher

    def check(self) -> None:
        """Refuse options out of range, by the names that they have in a loss.

        Raises:
            ValueError: One of them is out of range.
        """
        check_range("distillation_weight", self.distillation_weight, 0, 1)
        check_positive("teacher_temperature", self.temperature)
        check_choice("teacher", self.form, get_args(Teacher))

    def targets(
        self,
        knowledge: KnowledgeBase,
        ids: Tensor,
        *,
        ignore: Tensor | None,
        dtype: torch.dtype,
        gather: Callable[[Tensor], Tensor],
    ) -> BatchTargets:
        """The targets that stored knowledge gives a batch.

        Args:
            knowledge: The base that holds the training clips.
            ids: `(b,)` int64, the clips of this rank's samples.
            ignore: `(B, B)` boolean, pairs that shall be nobody's target.
            dtype: The dtype of the targets.
            gather: Function from this rank's rows `(b, ...)` to those of all ranks `(B, ...)`.
        """
        with torch.no_grad():
            stored = knowledge.find_clips(ids)
            audio, text, known = (gather(side) for side in (stored.audio, stored.text, stored.known))
            t2a, a2t = teacher_targets(
                audio.to(dtype),
                text.to(dtype),
                known,
                distillation_weight=self.distillation_weight,
                teacher_temperature=self.temperature,
                teacher=self.form,
                ignore=ignore,
            )
        return BatchTargets(t2a, a2t, known)
