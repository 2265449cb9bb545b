"""`NTXentLoss`: the plain contrast, and its common variants. Axes: `B` batch, `d` width."""

from typing import ClassVar, get_args

import torch
from torch import Tensor

from ask_lightning.functional.contrastive import nt_xent, pair_targets
from ask_lightning.interaction import Embeddings
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import SharedPositives, Temperature
from ask_lightning.losses.interacting import InteractingLoss, InteractionLike
from ask_lightning.utilities.arguments import check_range


class NTXentLoss(InteractingLoss):
    """The symmetric NT-Xent loss (InfoNCE) of a batch, with label smoothing, several positives, or decoupled.

    With S the similarities of the batch and Y the targets, which are the own pairs by default:

        L = ½ [ H(Y, softmax(S / τ)) + H(Y, softmax(Sᵀ / τ)) ]

    References:
        NT-Xent between modalities is the loss of CLIP (Radford et al., arXiv 2103.00020). Several positives:
        L_out of SupCon (Khosla et al., arXiv 2004.11362, Eq. 2), between modalities. Decoupled: DCL (Yeh et
        al., arXiv 2110.06848, Eq. 5), between modalities.

    Requirements:
        No knowledge; clip ids where `positives` is not `"diagonal"`.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        label_smoothing: ε in [0, 1], the share of the targets that is spread evenly over all candidates of
            the batch, as in `torch.nn.functional.cross_entropy`. It has to be 0 with `decoupled`.
        positives: `"diagonal"`: each sample's own pair is its only positive. `"ids"`: other samples of the
            same clip leave the denominator and are nobody's target. `"same_clip"`: they are positives as
            well, and the target is uniform over all positives.
        decoupled: Whether the positives leave the denominator, which then holds the negatives alone.
        interaction: How texts and audios are compared: None is the dot product of pooled embeddings; others
            are the name of the model's attribute that is an `Interaction`, the interaction itself, or another
            callable `(text, audio)` that returns `Similarities` or one matrix `(B, B)` with texts as rows.
        gather: Whether the loss is computed over the batches of all ranks, as `RetrievalLoss` describes.

    Attributes:
        last: Detached terms of the last call: `loss`, and `contrastive_t2a` and `contrastive_a2t`, the two
            directions.

    Raises:
        ValueError: An argument is outside its range, or `label_smoothing` is combined with `decoupled`.

    Examples:
        >>> loss = NTXentLoss(temperature=1.0, label_smoothing=0.1)
        >>> loss(torch.zeros(4, 2), torch.zeros(4, 2))  # log 4
        tensor(1.3863)
    """

    needs_knowledge = False
    kinds_of_positives: ClassVar[tuple[str, ...]] = get_args(SharedPositives)

    def __init__(
        self,
        temperature: Temperature = 0.07,
        *,
        label_smoothing: float = 0.0,
        positives: SharedPositives = "diagonal",
        decoupled: bool = False,
        interaction: InteractionLike | str | None = None,
        gather: bool = False,
    ) -> None:
        super().__init__(temperature, positives=positives, interaction=interaction, gather=gather)
        check_range("label_smoothing", label_smoothing, 0, 1)
        if decoupled and label_smoothing > 0:
            raise ValueError(
                "Argument `label_smoothing` has to be 0 with `decoupled=True`, but got "
                f"{label_smoothing}: with smoothed labels every candidate is a positive, and positives leave "
                "the denominator."
            )
        # NumPy numbers would make checkpoints that `weights_only=True` refuses.
        self.label_smoothing = float(label_smoothing)
        self.decoupled = decoupled

    def extra_repr(self) -> str:
        """The options that decide what the targets are."""
        names = ("label_smoothing", "positives", "decoupled")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def compute(
        self, audio: Embeddings, text: Embeddings, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms, as `RetrievalLoss` describes."""
        audio, text, _ = self.compared(audio, text)  # (B, d)
        similarities = self.similarities(text, audio)
        same_clip = self._same_clip(ids)
        ignore = same_clip if self.positives == "ids" else None
        shared = same_clip if self.positives == "same_clip" else None
        targets = None
        if self.label_smoothing > 0 or shared is not None:
            own = torch.eye(len(audio), dtype=torch.bool, device=similarities.to_audio.device)
            targets = pair_targets(
                own if shared is None else shared,
                label_smoothing=self.label_smoothing,
                ignore=ignore,
                dtype=similarities.to_audio.dtype,
            )
        to_audio, to_text = (
            nt_xent(scores, self.temperature, targets=targets, ignore=ignore, decoupled=self.decoupled)
            for scores in (similarities.to_audio, similarities.to_text)
        )
        loss = 0.5 * (to_audio + to_text)
        return loss, {"loss": loss, "contrastive_t2a": to_audio, "contrastive_a2t": to_text}
