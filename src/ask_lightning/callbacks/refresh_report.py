"""What a refresh tells about the knowledge."""

from __future__ import annotations

import torch

from ask_lightning.knowledge.base import KnowledgeBase

# RDM scores each query against every row of both bases; a mean over this many is exact enough to plot.
_DRIFT_QUERIES = 1024


def knowledge_drift(current: KnowledgeBase, stored: KnowledgeBase) -> dict[str, torch.Tensor]:
    """RDM of each modality between two bases of the same rows, over evenly spaced queries.

    Args:
        current: The base that the current encoders made.
        stored: The base that older encoders made.

    Returns:
        The drifts `rdm_audio` and `rdm_text`, 0-d.
    """
    rows = len(current.fine)
    queries = torch.linspace(0, rows - 1, min(rows, _DRIFT_QUERIES), device=current.device).long()
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
