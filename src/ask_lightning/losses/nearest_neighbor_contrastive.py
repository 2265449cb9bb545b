"""`NearestNeighborContrastiveLoss`: stored texts as positives.

Axes: `B` batch, `n` rows of the support set, `d` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ask_lightning.functional.contrastive import nt_xent
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Positives, Temperature
from ask_lightning.losses.queued import QueuedLoss
from ask_lightning.utilities.arguments import check_count


class NearestNeighborContrastiveLoss(QueuedLoss):
    """Contrast of each audio with the nearest neighbour of its text in a support set (NNCLR).

    A text of another clip that says nearly the same is a second description of the audio. The support set Q
    holds the texts of earlier batches. With p_i = argmax_{q ∈ Q} v_i · q, which has no gradient:

        L = ½ [ CE(U Pᵀ / τ) + CE(V Uᵀ / τ) ]

    From audio to text neighbours take the place of the texts, as positives and as the candidates of the
    others. From text to audio the pair's own embeddings are contrasted: there is no support set of audio, and
    rows of a support set give the text encoder no gradient, so it learns here. Until the support set is full,
    when a nearest text may be far, the loss is NT-Xent.

    References:
        Nearest-neighbour contrastive learning, arXiv 2104.14548, which has one modality; a support set of
        texts only, as in DeCLIP (arXiv 2110.05208), whose captions are the better judges of likeness.

    Requirements:
        Encoders that are not random: neighbours of an untrained text encoder are wrong positives.

    Recommendations:
        A support set of at most the number of training texts; in a larger one the neighbour is often
        the sample's own text of the epoch before (`own_clip_neighbors`), which teaches nothing new.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        support_size: n, the number of texts in the support set, at least 1; the paper has 98,304.
        positives: `"ids"`: samples and neighbours of the same clip are no negatives of each other; needs
            ids. `"diagonal"`: they are. A neighbour that two samples share is no negative in either case.
        gather: `True`: the loss is over the batches of all ranks, with the gradient of one process that has
            them all. `False`: over the local batch. The support set is that of all ranks in either case.

    Attributes:
        last: Detached terms of the last call: `loss`; `queue_fill`, the share of the support set that is
            filled; once it is full, `neighbor_similarity`, the mean similarity of texts and their neighbours;
            `shared_neighbors`, the number of other samples with the same neighbour, mean over the batch;
            with ids `own_clip_neighbors`, the share of neighbours that are of the sample's own clip.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 8, 16, generator=generator)
        >>> loss = NearestNeighborContrastiveLoss(support_size=8)
        >>> _ = loss(audio, text, ids=range(8))  # fills the support set
        >>> _ = loss(audio, text, ids=range(8))
        >>> loss.last["own_clip_neighbors"]
        tensor(1.)
    """

    def __init__(
        self,
        temperature: Temperature = 0.07,
        support_size: int = 4096,
        *,
        positives: Positives = "ids",
        gather: bool = False,
    ) -> None:
        check_count("support_size", support_size)
        super().__init__(support_size, temperature, positives=positives, gather=gather)
        self.support_size = support_size

    def extra_repr(self) -> str:
        """The size of the support set."""
        return f"support_size={self.support_size}"

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms; in evaluation it is NT-Xent."""
        audio, text = self._rows_of_all_ranks(audio, text)  # (B, d)
        ids = None if ids is None else self._gathered(ids)
        same_clip = ids[:, None] == ids if self.positives == "ids" and ids is not None else None
        to_text, ignore = text, same_clip
        terms: dict[str, Tensor] = {}
        if self.training and self._queue.is_full:
            to_text, of_neighbors, terms = self._neighbors(text, ids)
            ignore = of_neighbors if same_clip is None else same_clip | of_neighbors
        loss = 0.5 * (
            nt_xent(audio @ to_text.T, self.temperature, ignore=ignore)
            + nt_xent(text @ audio.T, self.temperature, ignore=same_clip)
        )
        terms |= {"loss": loss, **self._fill(loss)}
        if self.training:
            self._remember(ids, text=text.detach())
        return loss, terms

    @torch.no_grad()
    def _neighbors(self, text: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The nearest support row of each text.

        Args:
            text: `(B, d)` unit vectors.
            ids: `(B,)`, the clips of the batch.

        Returns:
            The neighbours P `(B, d)`; `(B, B)`, true where the neighbour of a column is none that the audio
            of a row can be told from; and terms for the log.
        """
        support = self._queue.column("text", like=text)  # (n, d)
        similarity, rows = (text @ support.T).max(dim=1)  # (B,)
        ignore = rows[:, None] == rows  # (B, B)
        terms = {
            "neighbor_similarity": similarity.mean(),
            "shared_neighbors": (ignore.sum() - len(rows)) / len(rows),
        }
        if ids is not None:
            clips = self._queue.column("ids", like=ids)[rows]  # (B,)
            terms["own_clip_neighbors"] = (clips == ids).to(text.dtype).mean()
            if self.positives == "ids":
                ignore = ignore | (ids[:, None] == clips)
        return support[rows], ignore, terms
