"""Retrieval metrics of a trained model, raw and calibrated. Axes: `N` pairs, `d` width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ask_lightning.encoding.encoders import find_pair_encoder
from ask_lightning.functional import unit_length
from ask_lightning.metrics import AudioTextRetrieval, Calibration, QueryBank, choose_calibration
from ask_lightning.metrics.table import CALIBRATED, RECALLS
from ask_lightning.utilities.clip_ids import integer_ids


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

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Audio, text and clip ids."""
        return self.audio, self.text, self.clip_ids


@dataclass(frozen=True)
class Metrics:
    """Metrics of a model under the names in `RECALLS`, as fractions.

    Attributes:
        validation: Metrics of the validation part by cosine similarity.
        test: Metrics of the test part by cosine similarity.
        validation_calibrated: Metrics of the validation part in calibrated search.
        test_calibrated: Metrics of the test part in calibrated search.
        calibration: The calibration that was best on the validation part.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    validation_calibrated: Mapping[str, float]
    test_calibrated: Mapping[str, float]
    calibration: Calibration = field(default_factory=Calibration)


class _Embedder(pl.LightningModule):
    """Predicts embeddings, so that the trainer handles evaluation mode, device and precision."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> tuple[Tensor, ...]:
        sides = (unit_length(side.float()).cpu() for side in find_pair_encoder(self.module)(batch))
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

    The calibration is the one that `ask_lightning.metrics.choose_calibration` finds on the validation part.

    Args:
        validation: Embeddings of the validation part.
        test: Embeddings of the test part.
        bank: Embeddings of the training part, whose captions are the queries that clips are calibrated by
            and whose clips are those that captions are calibrated by.

    Returns:
        The metrics.
    """
    queries = QueryBank.from_pairs(*bank.pairs)
    calibration = choose_calibration(*validation.pairs, queries)
    recalls = []
    for part in (validation, test):
        metric = AudioTextRetrieval()
        metric.calibrate(queries, calibration)
        metric.update(*part.pairs)
        scores = metric.compute()
        recalls += [
            {name: float(scores[f"{search}{name}"]) for name in RECALLS} for search in ("", CALIBRATED)
        ]
    return Metrics(
        validation=recalls[0],
        test=recalls[2],
        validation_calibrated=recalls[1],
        test_calibrated=recalls[3],
        calibration=calibration,
    )
