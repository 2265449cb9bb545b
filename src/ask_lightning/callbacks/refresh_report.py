"""What a refresh tells about the knowledge."""

from __future__ import annotations

import torch

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.mapped_pairs import MappedPairs

# RDM scores each query against every row of both bases; a mean over this many is exact enough to plot.
_DRIFT_QUERIES = 1024
# Rows in files may be so many that fewer queries have to do: as many as make so many scores.
_DRIFT_SCORES, _FEWEST_DRIFT_QUERIES = 1 << 28, 32


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
    queries = torch.linspace(0, rows - 1, min(rows, most, _DRIFT_QUERIES), device=current.device).long()
    drifts = current.fine.drift_from(stored.fine, queries)
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
