"""`TripletLoss`: pairs against negatives with a margin. Axes: `B` batch, `d` width."""

from typing import get_args

import torch
from torch import Tensor

from ask_lightning.functional.triplet import TripletNegatives, triplet_hinges
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Positives, RetrievalLoss
from ask_lightning.utilities.arguments import check_choice, check_range


class TripletLoss(RetrievalLoss):
    """The triplet loss of a batch in both directions, with the hardest negative or with all.

    With S the similarities of the batch, rows texts and columns audios, and m the margin:

        hardest:  L = 1/B Σ_i ( [m + max_{j≠i} S_ij - S_ii]_+ + [m + max_{j≠i} S_ji - S_ii]_+ )
        all:      L = 1/B Σ_i Σ_{j≠i} ( [m + S_ij - S_ii]_+ + [m + S_ji - S_ii]_+ )

    References:
        VSE++ (Faghri et al., arXiv 1707.05612, Eq. 5 and 6); for audio and text triplet-max and
        triplet-sum of Mei et al., arXiv 2203.15537.

    Requirements:
        No knowledge; clip ids with `positives="ids"`. The loss has no temperature.

    Args:
        margin: m ≥ 0, in units of cosine similarity.
        negatives: `"hardest"`: only the most similar negative of each sample counts. `"all"`: all do.
        positives: `"diagonal"`: all other samples are negatives. `"ids"`: those of the same clip are none.
        gather: Whether the loss is computed over the batches of all ranks, as `RetrievalLoss` describes.

    Attributes:
        last: Detached terms of the last call: `loss`; `triplet_t2a` and `triplet_a2t`, the two directions;
            `active_triplets`, the share of triplets within the margin, in [0, 1]; 0 where there are none.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> TripletLoss(margin=0.2)(torch.eye(2), torch.eye(2))
        tensor(0.)
    """

    needs_knowledge = False

    def __init__(
        self,
        margin: float = 0.2,
        *,
        negatives: TripletNegatives = "hardest",
        positives: Positives = "diagonal",
        gather: bool = False,
    ) -> None:
        super().__init__(positives=positives, gather=gather)
        check_range("margin", margin, 0)
        check_choice("negatives", negatives, get_args(TripletNegatives))
        # NumPy numbers would make checkpoints that `weights_only=True` refuses.
        self.margin = float(margin)
        self.negatives: TripletNegatives = negatives

    def extra_repr(self) -> str:
        """The options that decide what the triplets are."""
        return f"margin={self.margin}, negatives={self.negatives!r}, positives={self.positives!r}"

    @property
    def against_collapse(self) -> str:
        """What helps against embeddings that become all alike, see `RetrievalLoss`."""
        if self.negatives == "all":
            return super().against_collapse
        return (
            "The hardest negatives can pull all embeddings of an encoder that is not pretrained together, "
            'where the loss is twice the margin. Try TripletLoss(negatives="all"), a lower learning rate, '
            "or pretrained encoders."
        )

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms, as `RetrievalLoss` describes."""
        audio, text = self._rows_of_all_ranks(audio, text)  # (B, d)
        ignore = self._same_clip(ids)
        similarity = text @ audio.T  # (B texts, B audios)
        hinges = [
            triplet_hinges(scores, self.margin, negatives=self.negatives, ignore=ignore)
            for scores in (similarity, similarity.T)
        ]
        to_audio, to_text = (side.sum() / len(similarity) for side in hinges)
        loss = to_audio + to_text
        own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        is_negative = ~(own if ignore is None else own | ignore)  # (B, B)
        triplets = is_negative if self.negatives == "all" else is_negative.any(dim=1)
        active = torch.stack([(side > 0).sum() for side in hinges]).sum()
        share = active.to(loss.dtype) / (2 * triplets.sum()).clamp(min=1)
        terms = {"loss": loss, "triplet_t2a": to_audio, "triplet_a2t": to_text}
        return loss, terms | {"active_triplets": share}
