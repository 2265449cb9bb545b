"""Targets from stored knowledge, and cross-entropy against them. Axes: `B` batch, `d` width."""

from typing import Literal

import torch
from torch import Tensor

from ask_lightning.functional.transport import sinkhorn_plan

Teacher = Literal["softmax", "transport"]


def teacher_targets(
    audio: Tensor,
    text: Tensor,
    known: Tensor,
    *,
    distillation_weight: float = 0.7,
    teacher_temperature: float = 0.1,
    teacher: Teacher = "softmax",
    ignore: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft targets for a batch, from what the knowledge base has stored of the batch's own clips.

    With U⁰, V⁰ the stored audio and text embeddings:

        P^{T→A} = softmax_rows(V⁰ U⁰ᵀ / τ_t)      P^{A→T} = softmax_rows(U⁰ V⁰ᵀ / τ_t)
        Y = (1 - α) I + α P

    With `teacher="transport"` P^{T→A} = B · Sinkhorn(V⁰ U⁰ᵀ, ε = τ_t), and P^{A→T} is its transpose.

    A clip that the knowledge lacks has its own pair as its only target, and is nobody else's target.

    Args:
        audio: `(B, d)`, U⁰, unit vectors.
        text: `(B, d)`, V⁰, unit vectors.
        known: `(B,)` boolean, false for clips that the knowledge lacks; their vectors are not used.
        distillation_weight: α in [0, 1]. 0 gives the targets of NT-Xent.
        teacher_temperature: τ_t > 0. Large: uniform targets, which is label smoothing.
        teacher: `"softmax"` or `"transport"`.
        ignore: `(B, B)` boolean, pairs that shall be nobody's target, such as other captions of the same
            clip that leave the denominator. The diagonal is never ignored.

    Returns:
        Targets text-to-audio and audio-to-text, `(B, B)` each, rows of sum 1 (with `"transport"` those of
        text-to-audio up to the convergence of 50 iterations).

    References:
        The relatives are ALBEF's momentum distillation (arXiv 2107.07651) and estimated audio–caption
        correspondences (Primus et al., arXiv 2408.11641).

    Examples:
        >>> unit = torch.eye(2)
        >>> t2a, _ = teacher_targets(unit, unit, torch.tensor([True, True]), teacher_temperature=1e3)
        >>> t2a  # half of the weight of 0.7 each, and the rest on the pair itself
        tensor([[0.6502, 0.3498],
                [0.3498, 0.6502]])
    """
    similarity = text @ audio.T  # (B texts, B audios)
    refused = ~(known[:, None] & known)  # (B, B)
    if ignore is not None:
        refused |= ignore
    refused.fill_diagonal_(False)
    # A pair that is refused gets no mass; the diagonal never is, so that there is a softmax and a plan.
    similarity = similarity.masked_fill(refused, -torch.inf)
    if teacher == "softmax":
        logits = similarity / teacher_temperature
        to_audio, to_text = logits.softmax(dim=1), logits.T.softmax(dim=1)
    else:
        plan = sinkhorn_plan(similarity, teacher_temperature, bounded=False) * len(similarity)
        to_audio, to_text = plan, plan.T
    targets = distillation_weight * to_audio, distillation_weight * to_text
    for side in targets:
        side.diagonal().add_(1 - distillation_weight)
    return targets
