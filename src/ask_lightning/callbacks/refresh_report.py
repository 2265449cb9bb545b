"""What a refresh tells about the knowledge."""

from __future__ import annotations

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from ask_lightning.callbacks.renewal import Renewal
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.mapped_pairs import MappedPairs
from ask_lightning.utilities.evenly_spaced import evenly_spaced

# RDM scores each query against every row of both bases; a mean over this many is exact enough to plot.
_DRIFT_QUERIES = 1024
# Rows in files may be so many that fewer queries have to do: as many as make so many scores.
_DRIFT_SCORES, _FEWEST_DRIFT_QUERIES = 1 << 28, 32
# Mean cosine between embeddings above which they hardly distinguish anything.
_COLLAPSED = 0.95


class RefreshReport:
    """Says what new knowledge is like: numbers for the log, and what is worth a word once.

    Args:
        tells_search: Whether the kind of search is chosen, not given, so that the log has to say it.
    """

    def __init__(self, *, tells_search: bool) -> None:
        self._tells_search = tells_search
        self._told_search: str | None = None
        self._warned_of_collapse = False

    def tell_search(self, base: KnowledgeBase) -> None:
        """Say which search `index="auto"` has become and what is searched, when it is another than before.

        Args:
            base: The new base.
        """
        kind = base.fine.search_audio.kind
        if self._tells_search and kind != self._told_search:
            self._told_search = kind
            num_pairs, num_clips = len(base.fine), len(base.ids.unique())
            clips = f" of {num_clips} clips" if num_clips < num_pairs else ""
            rank_zero_info(
                f"The knowledge of {num_pairs} pairs{clips} is searched by index={kind!r}, chosen by "
                'index="auto".'
            )

    def values(
        self,
        renewal: Renewal,
        old: KnowledgeBase | None,
        seconds: float,
        *,
        is_partial: bool,
        against_collapse: str,
    ) -> dict[str, Any]:
        """What the log says of a refresh.

        Args:
            renewal: The new knowledge.
            old: The base that it has replaced, if there was one.
            seconds: How long the refresh took.
            is_partial: Whether it may have encoded some of the rows.
            against_collapse: What a warning of collapsed embeddings tells the user to do.
        """
        report: dict[str, Any] = {
            "refresh_seconds": seconds,
            "pairs_per_second": renewal.num_renewed / seconds,
            **renewal.report,
        }
        if is_partial:
            report["encoded_share"] = renewal.num_renewed / len(renewal.base.fine)
        similarity = mean_similarity(renewal.base)
        if old is not None:
            self._warn_of_collapse(similarity, against_collapse)
            if renewal.has_same_rows:
                report |= knowledge_drift(renewal.base, old)
        return report | similarity

    def _warn_of_collapse(self, similarity: dict[str, torch.Tensor], against_collapse: str) -> None:
        """Warn once if the embeddings of both modalities have collapsed."""
        audio, text = (float(value) for value in similarity.values())
        if min(audio, text) > _COLLAPSED and not self._warned_of_collapse:
            self._warned_of_collapse = True
            rank_zero_warn(
                f"The embeddings have collapsed: the mean cosine between source pairs is {audio:.3f} for "
                f"audio and {text:.3f} for text. {against_collapse}"
            )


def knowledge_drift(current: KnowledgeBase, stored: KnowledgeBase) -> dict[str, torch.Tensor]:
    """RDM of each modality between two bases of the same rows, over evenly spaced queries.

    Args:
        current: The base that the current encoders made.
        stored: The base that older encoders made.

    Returns:
        The drifts `rdm_audio` and `rdm_text`, 0-d.
    """
    rows = len(current.fine)
    is_in_files = isinstance(current.fine.local, MappedPairs)
    most = max(_FEWEST_DRIFT_QUERIES, _DRIFT_SCORES // rows) if is_in_files else _DRIFT_QUERIES
    queries = evenly_spaced(rows, min(most, _DRIFT_QUERIES))
    drifts = current.fine.drift_from(stored.fine, queries.to(current.device))
    return dict(zip(("rdm_audio", "rdm_text"), drifts, strict=True))


def mean_similarity(base: KnowledgeBase) -> dict[str, torch.Tensor]:
    """Mean cosine between all rows of each modality: near 0 if they are spread out, 1 if they are all equal.

    Args:
        base: The base to examine.

    Returns:
        The means `mean_similarity_audio` and `mean_similarity_text`, 0-d.
    """
    # The mean of all u_i · u_j is the squared length of the mean.
    audio, text = (mean.square().sum() for mean in base.fine.mean)
    return {"mean_similarity_audio": audio, "mean_similarity_text": text}
