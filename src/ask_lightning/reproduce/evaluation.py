"""Retrieval metrics of a trained model, raw and calibrated. Axes: `N` pairs, `C` clips, `d` width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ask_lightning.encoding.encoders import embed_batch, find_encoders
from ask_lightning.functional import unit_length
from ask_lightning.functional.calibration import hub_bias
from ask_lightning.metrics import retrieval_ranks, retrieval_scores
from ask_lightning.metrics.table import RECALLS, mean_recall
from ask_lightning.utilities.clip_ids import integer_ids

CALIBRATIONS: tuple[Mapping[str, Any], ...] = (
    *({"calibration": "inverted_softmax", "temperature": value} for value in (0.05, 0.1, 0.2)),
    *(
        {"calibration": "nearest_neighbors", "num_neighbors": count, "weight": weight}
        for count in (16, 128)
        for weight in (0.5, 0.75, 1.0)
    ),
)
"""Arguments of `hub_bias` that each run chooses from on its validation part."""


@dataclass(frozen=True)
class Embeddings:
    """The embedded pairs of a split.

    Attributes:
        audio: Unit vectors of the clips, `(N, d)`; row i is the clip of pair i.
        text: Unit vectors of the captions, `(N, d)`.
        clip_ids: Ids of the clips, `(N,)` int64.
    """

    audio: Tensor
    text: Tensor
    clip_ids: Tensor

    def clips(self) -> tuple[Tensor, Tensor]:
        """Unit vectors of the clips, each once, `(C, d)`, and the clip of each pair, `(N,)`."""
        _, clip_of = torch.unique(self.clip_ids, return_inverse=True)  # (N,)
        total = self.audio.new_zeros(int(clip_of.max()) + 1, self.audio.shape[1])
        return unit_length(total.index_add_(0, clip_of, self.audio)), clip_of


@dataclass(frozen=True)
class Metrics:
    """Metrics of a model under the names in `RECALLS`, as fractions.

    Attributes:
        validation: Metrics of the validation part by cosine similarity.
        test: Metrics of the test part by cosine similarity.
        validation_calibrated: Metrics of the validation part in calibrated search.
        test_calibrated: Metrics of the test part in calibrated search.
        calibration: Arguments of `hub_bias` that were best on the validation part.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    validation_calibrated: Mapping[str, float]
    test_calibrated: Mapping[str, float]
    calibration: Mapping[str, Any] = field(default_factory=dict)


class _Embedder(pl.LightningModule):
    """Predicts embeddings, so that the trainer handles evaluation mode, device and precision."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> tuple[Tensor, ...]:
        if callable(embed_pairs := getattr(self.module, "embed_pairs", None)):
            audio, text, _ = embed_pairs(batch)
        else:
            audio, text = embed_batch(self.module, *find_encoders(self.module), batch)
        sides = (unit_length(side.float()).cpu() for side in (audio, text))
        return *sides, integer_ids(batch["clip_id"]).cpu()


def embed_loader(trainer: pl.Trainer, module: pl.LightningModule, loader: object) -> Embeddings:
    """Embed the pairs of a loader in evaluation mode.

    Args:
        trainer: A trainer on one device.
        module: The module, an `ASKModule` or one whose encoders `find_encoders` finds.
        loader: Loader of batches with `"clip_id"`.

    Returns:
        The embeddings on the CPU, in the order of the loader.
    """
    batches: Any = trainer.predict(_Embedder(module), loader)
    audio, text, clip_ids = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Embeddings(audio, text, clip_ids)


def evaluate(validation: Embeddings, test: Embeddings, bank: Embeddings) -> Metrics:
    """Rank both parts, raw and calibrated.

    The calibration is the one of `CALIBRATIONS` with the highest mean recall on the validation part.

    Args:
        validation: Embeddings of the validation part.
        test: Embeddings of the test part.
        bank: Embeddings of the training part, whose captions are the queries that clips are calibrated by
            and whose clips are those that captions are calibrated by.

    Returns:
        The metrics.
    """
    tried = [retrieval_metrics(validation, bank, calibration) for calibration in CALIBRATIONS]
    best = max(range(len(tried)), key=lambda number: mean_recall(tried[number]))
    return Metrics(
        validation=retrieval_metrics(validation),
        test=retrieval_metrics(test),
        validation_calibrated=tried[best],
        test_calibrated=retrieval_metrics(test, bank, CALIBRATIONS[best]),
        calibration=CALIBRATIONS[best],
    )


def retrieval_metrics(
    part: Embeddings, bank: Embeddings | None = None, calibration: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Rank the pairs of a part.

    Args:
        part: Embeddings to rank.
        bank: Embeddings of the training part; without it the search is not calibrated.
        calibration: Arguments of `hub_bias`.

    Returns:
        Metrics under the names in `RECALLS`.

    Examples:
        >>> part = Embeddings(torch.eye(2), torch.eye(2), torch.arange(2))
        >>> mean_recall(retrieval_metrics(part)), mean_recall(retrieval_metrics(part, bank=part))
        (1.0, 1.0)
    """
    audio_bias = text_bias = None
    if bank is not None:
        options = {} if calibration is None else calibration
        clips, clip_of = part.clips()  # (C, d), (N,)
        audio_bias = hub_bias(clips, bank.text, **options)[clip_of]  # (N,)
        text_bias = hub_bias(part.text, bank.clips()[0], **options)  # (N,)
    ranks = retrieval_ranks(part.audio, part.text, part.clip_ids, audio_bias=audio_bias, text_bias=text_bias)
    scores = retrieval_scores(ranks)
    return {name: float(scores[name]) for name in RECALLS}
