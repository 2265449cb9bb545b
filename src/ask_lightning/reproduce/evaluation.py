"""Retrieval metrics of a trained model, raw and calibrated. Axes: `N` pairs, `d` width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from ask_lightning.encoding.encoders import find_interaction, find_token_encoder
from ask_lightning.interaction import (
    Embeddings,
    Interaction,
    TokenEmbeddings,
    joined,
    pooled,
    unit_embeddings,
)
from ask_lightning.metrics import AudioTextRetrieval, Calibration, QueryBank, choose_calibration
from ask_lightning.metrics.table import CALIBRATED, RECALLS
from ask_lightning.utilities.clip_ids import integer_ids


@dataclass(frozen=True)
class EmbeddedPart:
    """The embedded pairs of a split.

    Attributes:
        audio: Unit vectors of the clips, `(N, d)`; row i is the clip of pair i. With an interaction of tokens
            `TokenEmbeddings` of clips and frames.
        text: Unit vectors of the captions, `(N, d)`, or `TokenEmbeddings` of captions and words.
        clip_ids: Ids of the clips, `(N,)` int64.
    """

    audio: Embeddings
    text: Embeddings
    clip_ids: Tensor


@dataclass(frozen=True)
class Metrics:
    """Metrics of a model under the names in `RECALLS`, as fractions.

    Attributes:
        validation: Metrics of the validation part by cosine similarity, or by the model's interaction.
        test: Metrics of the test part by the same.
        validation_calibrated: Metrics of the validation part in calibrated search. None for a model with an
            interaction: calibrated search is of cosine similarities.
        test_calibrated: Metrics of the test part in calibrated search, or None.
        calibration: The calibration that was best on the validation part, or None.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    validation_calibrated: Mapping[str, float] | None = None
    test_calibrated: Mapping[str, float] | None = None
    calibration: Calibration | None = None


class _Embedder(pl.LightningModule):
    """Predicts embeddings, so that the trainer handles evaluation mode, device and precision."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module
        self.batches: list[EmbeddedPart] = []

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        sides = find_token_encoder(self.module)(batch)
        if find_interaction(self.module) is None:
            sides = pooled(sides[0]), pooled(sides[1])
        audio, text = (unit_embeddings(side, torch.float32).to("cpu") for side in sides)
        # Kept here, since a trainer cannot take frozen dataclasses.
        self.batches.append(EmbeddedPart(audio, text, integer_ids(batch["clip_id"]).cpu()))
        return len(audio)


def embed_loader(trainer: pl.Trainer, module: pl.LightningModule, loader: object) -> EmbeddedPart:
    """Embed the pairs of a loader in evaluation mode.

    Args:
        trainer: A trainer on one device.
        module: The module, an `ASKModule` or one whose encoders `find_encoders` finds.
        loader: Loader of batches with `"clip_id"`.

    Returns:
        The embeddings on the CPU, in the order of the loader, with those of tokens if the module has an
        interaction.

    Raises:
        SIGTERMException: The process was asked to end meanwhile.
    """
    embedder = _Embedder(module)
    trainer.predict(embedder, loader, return_predictions=False)
    if trainer.received_sigterm:  # which Lightning heeds in training alone
        raise SIGTERMException
    batches = embedder.batches
    audio, text = (_joined([getattr(batch, side) for batch in batches]) for side in ("audio", "text"))
    return EmbeddedPart(audio, text, torch.cat([batch.clip_ids for batch in batches]))


def _joined(parts: Sequence[Any]) -> Embeddings:
    """The rows of all batches."""
    return joined(parts) if isinstance(parts[0], TokenEmbeddings) else torch.cat([*parts])


def evaluate(validation: EmbeddedPart, test: EmbeddedPart, bank: EmbeddedPart) -> Metrics:
    """Rank both parts by cosine similarity, raw and calibrated.

    The calibration is the one that `ask_lightning.metrics.choose_calibration` finds on the validation part.

    Args:
        validation: Embeddings of the validation part.
        test: Embeddings of the test part.
        bank: Embeddings of the training part, whose captions are the queries that clips are calibrated by
            and whose clips are those that captions are calibrated by.

    Returns:
        The metrics.
    """
    queries = QueryBank.from_pairs(pooled(bank.audio), pooled(bank.text), bank.clip_ids)
    calibration = choose_calibration(
        pooled(validation.audio), pooled(validation.text), validation.clip_ids, queries
    )
    recalls = []
    for part in (validation, test):
        metric = AudioTextRetrieval()
        metric.calibrate(queries, calibration)
        scores = _scores(metric, part)
        recalls += [_recalls(scores), _recalls(scores, CALIBRATED)]
    return Metrics(
        validation=recalls[0],
        test=recalls[2],
        validation_calibrated=recalls[1],
        test_calibrated=recalls[3],
        calibration=calibration,
    )


def evaluate_uncalibrated(
    validation: EmbeddedPart, test: EmbeddedPart, interaction: Interaction | None = None
) -> Metrics:
    """Rank both parts by cosine similarity or by an interaction, without calibrated search.

    Args:
        validation: Embeddings of the validation part, with those of tokens if the interaction compares them.
        test: Embeddings of the test part of the same kind.
        interaction: How clips and captions are compared, on the CPU; None: by cosine similarity.

    Returns:
        The metrics, without those of calibrated search.
    """
    return Metrics(recalls_of(validation, interaction), recalls_of(test, interaction))


def recalls_of(part: EmbeddedPart, interaction: Interaction | None = None) -> dict[str, float]:
    """Rank one part by cosine similarity or by an interaction.

    Args:
        part: Embeddings of the part.
        interaction: How clips and captions are compared, on the CPU; None: by cosine similarity.

    Returns:
        Recalls under the names in `RECALLS`, as fractions.
    """
    return _recalls(_scores(AudioTextRetrieval(interaction=interaction), part))


def _scores(metric: AudioTextRetrieval, part: EmbeddedPart) -> dict[str, Tensor]:
    """What a metric says of a part."""
    metric.reset()
    metric.update(part.audio, part.text, part.clip_ids)
    return metric.compute()


def _recalls(scores: Mapping[str, Tensor], search: str = "") -> dict[str, float]:
    """The recalls of a kind of search."""
    return {name: float(scores[f"{search}{name}"]) for name in RECALLS}
