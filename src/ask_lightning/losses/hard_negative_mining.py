"""`HardNegativeMiningLoss`: negatives from the knowledge base.

Axes: `B` batch, `C` candidates, `K` negatives, `d` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ask_lightning.functional.contrastive import nt_xent
from ask_lightning.functional.negative_mining import repeated, select_hard_negatives
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Positives, RetrievalLoss, Temperature
from ask_lightning.utilities.arguments import check_count, check_range


class HardNegativeMiningLoss(RetrievalLoss):
    """NT-Xent with the most similar stored items of the other modality as further negatives (ANCE).

    A random batch holds few items that are hard to tell from a pair's own. The knowledge base, encoded every
    T epochs, is searched for them: with the audio embedding among the stored texts, with the text embedding
    among the stored audios. Items of the pair's own clip are left out, and those that are likely to match as
    well: of a higher score than a share of the pair's own. With Nᵃ_i and Nᵗ_i the K hardest of the rest:

        L = ½ [ CE(V [U; Nᵃ_i]ᵀ / τ) + CE(U [V; Nᵗ_i]ᵀ / τ) ]

    Stored embeddings have no gradient. While pairs score low, as at the start of training, most candidates
    are filtered and the loss is close to NT-Xent.

    References:
        ANCE, arXiv 2007.00808, whose index of all documents is renewed as training goes on; the filter of
        false negatives is that of NV-Retriever, arXiv 2407.15831 (TopK-PercPos, 95%).

    Requirements:
        Clip ids, and a `KnowledgeBase` whose ids are of the same kind: `KnowledgeRefreshCallback` makes one.

    Args:
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, a callable
            `(model)` that returns τ, or the model's own parameter that is τ.
        num_negatives: K ≥ 1, the number of further negatives of each query. A query for which fewer remain
            has fewer.
        num_candidates: C ≥ K, the number of most similar stored items among which they are chosen; at most
            all that are stored.
        false_negative_threshold: Share p in [0, 1] of the score of a query's own pair; a stored item of a
            higher score than p times that is taken for a false negative. `None`: no item is.
        positives: `"ids"`: other samples of the same clip in the batch are left out of the denominator.
            `"diagonal"`: they are negatives. Stored items of the same clip never are.
        gather: `True`: the loss is over the batches of all ranks, with the gradient of one process that has
            them all. `False`: over the local batch.

    Attributes:
        knowledge: The `KnowledgeBase` in use, or `None`.
        last: Detached terms of the last call: `loss`; for a query, mean over batch and directions,
            `mined_negatives`, the number of negatives from the base, and `filtered_negatives`, the number of
            candidates taken for false negatives; `mined_similarity`, the mean similarity of queries and
            mined negatives, 0 if there are none.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 100, 16, generator=generator)
        >>> loss = HardNegativeMiningLoss(num_negatives=4, num_candidates=20)
        >>> loss.knowledge = KnowledgeBase.from_embeddings(audio, text, ids=range(100), num_prototypes=8)
        >>> loss(audio[:32], text[:32], ids=range(32)).shape
        torch.Size([])
    """

    contrasts_batch_only = False

    def __init__(
        self,
        temperature: Temperature = 0.07,
        num_negatives: int = 8,
        *,
        num_candidates: int = 100,
        false_negative_threshold: float | None = 0.95,
        positives: Positives = "ids",
        gather: bool = False,
    ) -> None:
        super().__init__(temperature, positives=positives, gather=gather)
        check_count("num_negatives", num_negatives)
        check_count("num_candidates", num_candidates, num_negatives)
        if false_negative_threshold is not None:
            check_range("false_negative_threshold", false_negative_threshold, 0, 1)
            false_negative_threshold = float(false_negative_threshold)
        self.num_negatives = num_negatives
        self.num_candidates = num_candidates
        self.false_negative_threshold = false_negative_threshold

    @property
    def needs_ids(self) -> bool:
        """Always: the stored items of the pair's own clip are no negatives."""
        return True

    @property
    def needs_prototypes(self) -> bool:
        """Never: the negatives are stored pairs."""
        return False

    def check_knowledge(self, knowledge: KnowledgeBase) -> None:
        """Prepare a base for lookups; none is refused.

        Args:
            knowledge: The new base.
        """
        knowledge.prepare(("fine",))

    def extra_repr(self) -> str:
        """The options that decide what a negative is."""
        names = ("num_negatives", "num_candidates", "false_negative_threshold")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def compute(
        self, audio: Tensor, text: Tensor, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms; without knowledge, in evaluation, it is NT-Xent."""
        assert ids is not None
        if knowledge is None:
            audio, text = self._rows_of_all_ranks(audio, text)
            ignore, scores = self._same_clip(ids), text @ audio.T
            loss = 0.5 * sum(
                (nt_xent(side, self.temperature, ignore=ignore) for side in (scores, scores.T)),
                start=scores.new_zeros(()),
            )
            return loss, {"loss": loss}
        audios, texts, chosen, num_filtered = self._mine(audio, text, ids, knowledge)
        of_text = torch.einsum("bd,bkd->bk", text, audios)  # (B, K)
        of_audio = torch.einsum("bd,bkd->bk", audio, texts)
        audio, text, of_text, of_audio = self._rows_of_all_ranks(audio, text, of_text, of_audio)
        chosen, num_filtered = (self._gathered(side) for side in (chosen, num_filtered))
        same_clip = self._same_clip(ids)
        if same_clip is None:
            same_clip = torch.zeros(len(audio), len(audio), dtype=torch.bool, device=audio.device)
        losses = [
            nt_xent(
                torch.cat([scores, mined], dim=1),  # (B, B + K)
                self.temperature,
                ignore=torch.cat([same_clip, ~kept], dim=1),
            )
            for scores, mined, kept in (
                (text @ audio.T, of_text, chosen[:, 0]),
                (audio @ text.T, of_audio, chosen[:, 1]),
            )
        ]
        loss = 0.5 * (losses[0] + losses[1])
        mined = torch.stack([of_text, of_audio], dim=1).detach() * chosen  # (B, 2, K)
        return loss, {
            "loss": loss,
            "mined_negatives": chosen.sum(dim=2).to(loss.dtype).mean(),
            "filtered_negatives": num_filtered.to(loss.dtype).mean(),
            "mined_similarity": mined.sum() / chosen.sum().clamp(min=1),
        }

    @torch.no_grad()
    def _mine(
        self, audio: Tensor, text: Tensor, ids: Tensor, knowledge: KnowledgeBase
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Search the base for negatives; collective if it is sharded.

        Args:
            audio: `(B, d)` unit vectors.
            text: `(B, d)` unit vectors.
            ids: `(B,)`, the clips of the batch.
            knowledge: The base to search.

        Returns:
            The audios that each text has as negatives and the texts that each audio has, `(B, K, d)` each;
            `(B, 2, K)` boolean, which of them are to be used, and `(B, 2)`, how many candidates were
            filtered, for the text and the audio queries.
        """
        pairs = knowledge.fine
        num_candidates = min(self.num_candidates, len(pairs))
        num_negatives = min(self.num_negatives, num_candidates)
        own = (audio * text).sum(dim=1)  # (B,)
        rows, chosen, num_filtered = [], [], []
        for queries, search, holds_clips in (
            (text, pairs.search_audio, True),
            (audio, pairs.search_text, False),
        ):
            scores, found = search(queries, num_candidates)  # (B, C)
            clips = knowledge.ids[found]  # (B, C)
            excluded = clips == ids[:, None]
            if holds_clips:  # a clip is stored once for each of its captions
                excluded = excluded | repeated(clips)
            columns, kept, filtered = select_hard_negatives(
                scores, own, excluded, num_negatives, self.false_negative_threshold
            )
            rows.append(found.gather(1, columns))  # (B, K)
            chosen.append(kept)
            num_filtered.append(filtered.sum(dim=1))
        audios, texts = pairs.pairs(torch.stack(rows))  # (2, B, K, d)
        return (
            audios[0].to(audio.dtype),
            texts[1].to(audio.dtype),
            torch.stack(chosen, dim=1),
            torch.stack(num_filtered, dim=1),
        )
