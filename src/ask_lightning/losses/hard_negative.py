"""`HardNegativeLoss`: NT-Xent with reweighted negatives. Axes: `B` batch, `d` width."""

from typing import ClassVar, get_args

import torch
from torch import Tensor

from ask_lightning.functional.hard_negatives import hard_negative_nt_xent, negative_weights
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import RetrievalLoss, SharedPositives, Temperature
from ask_lightning.utilities.arguments import check_fraction, check_range


class HardNegativeLoss(RetrievalLoss):
    """The symmetric NT-Xent loss whose negatives count the more, the more similar they are to the query.

    A negative j of a query i has the weight w_ij ∝ exp(β S_ij / τ), with a mean of 1 over the N negatives:

        L_i = -log( p_i / (α p_i + Σ_j w_ij exp(S_ij / τ)) ),   p_i = exp(S_ii / τ)

    and the loss is the mean over both directions. β = 0 with α = 1 is `NTXentLoss`, β = 0 with α = 0 is its
    decoupled form. With a prior τ⁺ > 0 the sum over negatives is corrected by the positives that are expected
    among them, see `ask_lightning.functional.hard_negative_nt_xent`.

    References:
        Weights and prior: Robinson et al., arXiv 2010.04592. Between modalities, with α: HN-NCE (Radenovic et
        al., arXiv 2301.02280). For audio and text: the Hybrid-NCE loss of AuroLA (Xu et al., arXiv
        2602.18010), whose published code has β = 0.1, α = 1, τ = 0.05, trains in the direction audio to text,
        and sums p_i over several positives that are found by clusters of tags. Here both directions count,
        and the several positives of `"same_clip"` are the samples of the same clip, with equal weights.

    Requirements:
        No knowledge; clip ids where `positives` is not `"diagonal"`.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        hardness: β ≥ 0, how much the weights grow with similarity.
        positive_weight: α in [0, 1], the weight of the positives in the denominator.
        positive_prior: τ⁺ in [0, 1), the assumed probability that a negative is a positive. With α = 0 and
            τ⁺ > 0 the loss is bounded below by the correction's floor.
        positives: `"diagonal"`: each sample's own pair is its only positive. `"ids"`: other samples of the
            same clip are neither positives nor negatives. `"same_clip"`: they are positives as well, and p_i
            is the sum over all positives.
        gather: Whether the loss is computed over the batches of all ranks, as `RetrievalLoss` describes.

    Attributes:
        last: Detached terms of the last call: `loss`; `contrastive_t2a` and `contrastive_a2t`, the two
            directions; `hardest_weight`, the mean over queries of the largest w_ij, from 1 to N.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> loss = HardNegativeLoss(temperature=1.0, hardness=0.5)
        >>> loss(torch.zeros(4, 2), torch.zeros(4, 2))  # log 4
        tensor(1.3863)
    """

    needs_knowledge = False
    kinds_of_positives: ClassVar[tuple[str, ...]] = get_args(SharedPositives)

    def __init__(
        self,
        temperature: Temperature = 0.07,
        hardness: float = 0.1,
        *,
        positive_weight: float = 1.0,
        positive_prior: float = 0.0,
        positives: SharedPositives = "diagonal",
        gather: bool = False,
    ) -> None:
        super().__init__(temperature, positives=positives, gather=gather)
        check_range("hardness", hardness, 0)
        check_range("positive_weight", positive_weight, 0, 1)
        check_fraction("positive_prior", positive_prior)
        # NumPy numbers would make checkpoints that `weights_only=True` refuses.
        self.hardness = float(hardness)
        self.positive_weight = float(positive_weight)
        self.positive_prior = float(positive_prior)

    def extra_repr(self) -> str:
        """The options that decide how negatives and positives count."""
        names = ("hardness", "positive_weight", "positive_prior", "positives")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms, as `RetrievalLoss` describes."""
        audio, text = self._rows_of_all_ranks(audio, text)  # (B, d)
        same_clip = self._same_clip(ids)
        similarity = text @ audio.T  # (B texts, B audios)
        sides = (similarity, similarity.T)
        to_audio, to_text = (
            hard_negative_nt_xent(
                scores,
                self.temperature,
                hardness=self.hardness,
                positive_weight=self.positive_weight,
                positive_prior=self.positive_prior,
                positives=same_clip if self.positives == "same_clip" else None,
                ignore=same_clip if self.positives == "ids" else None,
            ).mean()
            for scores in sides
        )
        loss = 0.5 * (to_audio + to_text)
        terms = {"loss": loss, "contrastive_t2a": to_audio, "contrastive_a2t": to_text}
        return loss, terms | {"hardest_weight": self._hardest_weight(sides, same_clip)}

    @torch.no_grad()
    def _hardest_weight(self, sides: tuple[Tensor, Tensor], same_clip: Tensor | None) -> Tensor:
        """The mean over queries of both directions of the largest weight of a negative."""
        left_out = torch.eye(len(sides[0]), dtype=torch.bool, device=sides[0].device)
        if same_clip is not None:
            left_out = left_out | same_clip
        weights = [negative_weights(scores, self.temperature, self.hardness, left_out) for scores in sides]
        return torch.stack(weights).amax(dim=2).mean()
