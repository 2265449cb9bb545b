"""Projection heads over embeddings that two frozen encoders made. Axes: `N` pairs, `d` width."""

from __future__ import annotations

import csv
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from ask_lightning.data import DatasetsDataModule, split_by_clip
from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.tasks.task import Task

_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def embeddings_task(
    audio: Path,
    text: Path,
    pairs: Path,
    *,
    clip_id_column: str = "clip_id",
    split_seed: int = 0,
    width: int = 256,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    max_epochs: int = 30,
    T: int = 5,
    num_prototypes: int = 64,
) -> Task:
    """A retrieval task over precomputed embeddings, which trains in seconds.

    Row i of both arrays is one audio–caption pair. The split keeps all rows of a clip together, and every
    caption of a query's clip counts as correct.

    Args:
        audio: Audio embeddings, `.npy` of shape `(N, d)`.
        text: Text embeddings, `.npy` of shape `(N, d)`, perhaps of another width.
        pairs: CSV with a row for each pair, in the arrays' order.
        clip_id_column: Column of clip ids in the CSV.
        split_seed: Seed of the split into train, validation and test.
        width: Width of the shared space.
        learning_rate: Learning rate that suits the heads.
        batch_size: Number of pairs in a batch.
        max_epochs: Number of epochs of each run.
        T: Number of epochs from one refresh of the knowledge to the next.
        num_prototypes: Number of coarse prototypes.

    Returns:
        The task. The files are read when it is first used in a process.
    """
    files = (audio, text, pairs, clip_id_column, split_seed)
    return Task(
        name="embeddings",
        make_data=partial(_make_data, files, batch_size),
        make_model=partial(_make_model, files, width),
        learning_rate=learning_rate,
        max_epochs=max_epochs,
        refresh={"T": T, "num_prototypes": num_prototypes},
        description={
            "audio": str(audio),
            "text": str(text),
            "pairs": str(pairs),
            "clip_id_column": clip_id_column,
            "split_seed": split_seed,
            "width": width,
            "batch_size": batch_size,
        },
    )


class EmbeddedPairs(Dataset[dict[str, Any]]):
    """Audio–text pairs: rows of two arrays.

    Args:
        audio: Audio embeddings, `(N, d)`.
        text: Text embeddings, `(N, d)`.
        clip_id: Clip of each pair, `(N,)`.
        caption_id: Caption of each pair, `(N,)`.
    """

    def __init__(self, audio: Tensor, text: Tensor, clip_id: Tensor, caption_id: Tensor) -> None:
        self.audio, self.text, self.clip_id, self.caption_id = audio, text, clip_id, caption_id

    def __len__(self) -> int:
        return len(self.clip_id)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {
            "audio": self.audio[row],
            "text": self.text[row],
            "clip_id": self.clip_id[row],
            "caption_id": self.caption_id[row],
        }


class ProjectionHeads(pl.LightningModule):
    """Two small heads.

    Args:
        audio_width: Width of the audio embeddings.
        text_width: Width of the text embeddings.
        width: Width of the shared space.
        learning_rate: Highest learning rate of AdamW, which follows half a cosine.
    """

    def __init__(self, audio_width: int, text_width: int, width: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.audio_head = _head(audio_width, width)
        self.text_head = _head(text_width, width)
        self.val_metrics = AudioTextRetrieval()

    def encode_audio(self, batch: dict[str, Any]) -> Tensor:
        """Project the audio embeddings, `(B, width)`."""
        return normalize(self.audio_head(batch["audio"]), dim=1)

    def encode_text(self, batch: dict[str, Any]) -> Tensor:
        """Project the text embeddings, `(B, width)`."""
        return normalize(self.text_head(batch["text"]), dim=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the embeddings."""
        self.val_metrics.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and the mean recall."""
        scores = self.val_metrics.compute()
        self.val_metrics.reset()
        self.log_dict({f"val/{name}": score for name, score in scores.items()})
        self.log("val/mean_recall", mean_recall(scores))

    def configure_optimizers(self) -> Any:
        """AdamW whose learning rate falls along a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _head(incoming: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(incoming, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width))


@cache
def _load(
    audio: Path, text: Path, pairs: Path, clip_id_column: str, split_seed: int
) -> dict[str, EmbeddedPairs]:
    """Read the arrays and split them so that no clip is in two parts."""
    audio_rows, text_rows = (torch.from_numpy(np.load(path)).float() for path in (audio, text))
    with open(pairs, newline="", encoding="utf-8") as lines:
        table = csv.DictReader(lines)
        if clip_id_column not in (table.fieldnames or ()):
            raise ValueError(
                f"Argument `clip_id_column` has to be one of the columns {table.fieldnames} of {pairs}, but "
                f"got {clip_id_column!r}."
            )
        clips = [row[clip_id_column] for row in table]
    if not len(audio_rows) == len(text_rows) == len(clips):
        raise ValueError(
            f"The rows do not match: {len(audio_rows)} of {audio}, {len(text_rows)} of {text}, {len(clips)} "
            f"of {pairs}."
        )
    number = {clip: position for position, clip in enumerate(dict.fromkeys(clips))}
    clip_id = torch.tensor([number[clip] for clip in clips])
    parts = split_by_clip(clip_id.tolist(), tuple(_SHARES.values()), split_seed)
    return {
        name: EmbeddedPairs(audio_rows[rows], text_rows[rows], clip_id[rows], rows)
        for name, rows in zip(_SHARES, map(torch.tensor, parts), strict=True)
    }


def _make_data(files: tuple[Any, ...], batch_size: int, seed: int) -> DatasetsDataModule:
    return DatasetsDataModule(*_load(*files).values(), batch_size=batch_size, seed=seed)


def _make_model(files: tuple[Any, ...], width: int, learning_rate: float) -> ProjectionHeads:
    train = _load(*files)["train"]
    return ProjectionHeads(train.audio.shape[1], train.text.shape[1], width, learning_rate)
