"""`SigmoidLoss`: each pair of a batch is classified by itself. Axes: `B` batch, `d` width."""

from typing import ClassVar, get_args

import torch
from torch import Tensor

from ask_lightning.functional.sigmoid import sigmoid_losses
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import RetrievalLoss, Scalar, SharedPositives, Temperature


class SigmoidLoss(RetrievalLoss):
    """The pairwise sigmoid loss: whether a text and an audio belong together, for each of the B² of them.

    With S the similarities of the batch, z_ij = 1 where text i and audio j belong together and -1 elsewhere:

        L = -1/B Σ_ij log σ(z_ij (S_ij / τ + b))

    References:
        SigLIP (Zhai et al., arXiv 2303.15343, Eq. 3, where t = 1/τ). There t and b are learned and begin with
        t = 10 and b = -10; numbers that stay fixed are an option of this class.

    Requirements:
        No knowledge; clip ids where `positives` is not `"diagonal"`.

    Recommendations:
        Let the model learn both, as the paper does: `SigmoidLoss(tau, "bias")` with a function `tau(model)`.
        Most of the B² are negatives, so that a fixed bias far from the best one slows the start down.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        bias: b: a number, the name of the wrapped model's attribute that *is* b, a callable `(model)` that
            returns b, or the model's own parameter that is b.
        positives: `"diagonal"`: only the own pairs belong together. `"ids"`: other samples of the same clip
            do not count. `"same_clip"`: they belong together as well.
        gather: Whether the loss is computed over the batches of all ranks, as `RetrievalLoss` describes.

    Attributes:
        last: Detached terms of the last call: `loss`, and its parts `loss_positives` and `loss_negatives`.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> SigmoidLoss(bias=0.0)(torch.zeros(2, 2), torch.zeros(2, 2))  # 2 log 2
        tensor(1.3863)
    """

    needs_knowledge = False
    kinds_of_positives: ClassVar[tuple[str, ...]] = get_args(SharedPositives)
    scalar_names: ClassVar[tuple[str, ...]] = ("temperature", "bias")

    def __init__(
        self,
        temperature: Temperature = 0.1,
        bias: Scalar = -10.0,
        *,
        positives: SharedPositives = "diagonal",
        gather: bool = False,
    ) -> None:
        super().__init__(temperature, positives=positives, gather=gather)
        self._hold_scalar("bias", bias)

    @property
    def bias(self) -> float | Tensor:
        """The bias b at present, which may be set as the temperature may."""
        return self._scalar("bias")

    @bias.setter
    def bias(self, value: float) -> None:
        self._set_scalar("bias", value)

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms, as `RetrievalLoss` describes."""
        audio, text = self._rows_of_all_ranks(audio, text)  # (B, d)
        same_clip = self._same_clip(ids)
        ignore = same_clip if self.positives == "ids" else None
        shared = same_clip if self.positives == "same_clip" else None
        losses = sigmoid_losses(
            text @ audio.T, self.temperature, self.bias, positives=shared, ignore=ignore
        )  # (B texts, B audios)
        loss = losses.sum() / len(losses)
        positive = torch.eye(len(losses), dtype=torch.bool, device=losses.device)
        if shared is not None:
            positive = positive | shared
        of_positives = losses.detach()[positive].sum() / len(losses)
        terms = {"loss_positives": of_positives, "loss_negatives": loss.detach() - of_positives}
        return loss, {"loss": loss} | terms
