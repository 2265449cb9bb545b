"""Captions for captions: a clip's first caption plays the audio. Axes: `N` pairs, `C` clips."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ask_lightning.utilities.arguments import check_count, check_range

_NUM_CAPTIONS = 4
_LEAST_OCCURRENCES = 3
# Of Clotho's 3,839 development clips; another number of clips is divided in proportion.
_SPLIT_SIZES = {"train": 2639, "val": 500, "test": 700}


def captions_task(
    folder: Path,
    *,
    captions_per_clip: int = 4,
    batch_size: int = 32,
    max_epochs: int = 30,
    T: int = 15,
    num_prototypes: int = 512,
) -> Task:
    """A real retrieval task without sound that trains in a minute or two on one CPU core.

    Captions 2 to 5 are the text, read by an average of word vectors that starts from random numbers. Captions
    of training clips that the model does not train with, which there are with fewer than four
    `captions_per_clip`, are other knowledge, `"training clips, other captions"`.

    Args:
        folder: Folder of `caption_1_embeddings.npy`, of shape (clips, width), and of `pairs.csv` with a row
            for each clip, in the same order, and the columns `clip_id` and `caption_2` … `caption_5`.
        captions_per_clip: Number of captions of each training clip, from 1 to 4. Other clips have all four.
        batch_size: Number of pairs in a batch.
        max_epochs: Number of epochs of each run.
        T: Number of epochs from one refresh of the knowledge to the next.
        num_prototypes: Number of coarse prototypes.

    Returns:
        The task. It is read when it is first used in a process.

    Raises:
        ValueError: `captions_per_clip` is outside its range.
    """
    check_count("captions_per_clip", captions_per_clip)
    check_range("captions_per_clip", captions_per_clip, 1, _NUM_CAPTIONS)
    knowledge: dict[str, Callable[[], Dataset[Any]]] = {}
    if captions_per_clip < _NUM_CAPTIONS:
        knowledge["training clips, other captions"] = partial(_other_captions, folder, captions_per_clip)
    return Task(
        name="captions",
        make_data=partial(_make_data, folder, captions_per_clip, batch_size),
        make_model=partial(_make_model, folder, captions_per_clip),
        learning_rate=1e-3,
        max_epochs=max_epochs,
        refresh={"T": T, "num_prototypes": num_prototypes},
        description={"captions_per_clip": captions_per_clip, "batch_size": batch_size},
        knowledge_sources=knowledge,
    )


class CaptionPairs(Dataset[dict[str, Any]]):
    """Pairs of a first caption's embedding and another caption's words.

    Args:
        audio: Embeddings of all clips' first captions, `(C, d)`.
        words: Words of the second captions by their numbers, padded with 0, `(N, W)`.
        captions: The N second captions as texts, for a reader; models take the words.
        clip_id: Clip of each pair, `(N,)`.
        caption_id: Number of each pair's second caption among those of its clip, `(N,)`.
    """

    def __init__(
        self, audio: Tensor, words: Tensor, captions: Sequence[str], clip_id: Tensor, caption_id: Tensor
    ) -> None:
        self.audio, self.words, self.captions = audio[clip_id], words, captions
        self.clip_id, self.caption_id = clip_id, caption_id

    def __len__(self) -> int:
        return len(self.clip_id)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {
            "audio": self.audio[row],
            "words": self.words[row],
            "caption": self.captions[row],
            "clip_id": self.clip_id[row],
            "caption_id": self.caption_id[row],
        }


class CaptionRetriever(pl.LightningModule):
    """A head over sentence embeddings, and another over an average of word vectors.

    Args:
        audio_width: Width of the sentence embeddings.
        num_words: Number of words, with the padding.
        learning_rate: Learning rate of Adam, divided by ten after 20 epochs.
    """

    def __init__(self, audio_width: int, num_words: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.audio_head = _head(audio_width)
        self.word_vectors = nn.EmbeddingBag(num_words, 300, mode="mean", padding_idx=0)
        self.text_head = _head(300)
        self.val_metrics = AudioTextRetrieval()

    def encode_audio(self, batch: dict[str, Any]) -> Tensor:
        """Embed the first captions, `(B, 256)`."""
        return normalize(self.audio_head(batch["audio"]), dim=1)

    def encode_text(self, batch: dict[str, Any]) -> Tensor:
        """Embed the other captions, `(B, 256)`."""
        return normalize(self.text_head(self.word_vectors(batch["words"])), dim=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Collect the embeddings."""
        self.val_metrics.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        """Log the mean recall."""
        self.log("val/mean_recall", mean_recall(self.val_metrics.compute()))
        self.val_metrics.reset()

    def configure_optimizers(self) -> Any:
        """Adam with a step schedule."""
        # The fused step is three times as fast here, where most weights are word vectors.
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def _head(incoming: int) -> nn.Module:
    return nn.Sequential(nn.Linear(incoming, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 256))


@dataclass(frozen=True)
class _Loaded:
    """The parts, the captions that training leaves out, and the number of words with the padding."""

    parts: Mapping[str, CaptionPairs]
    others: CaptionPairs | None
    num_words: int


@cache
def _load(folder: Path, captions_per_clip: int) -> _Loaded:
    """Read the task and divide its clips."""
    audio = torch.from_numpy(np.load(folder / "caption_1_embeddings.npy")).float()
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if len(rows) != len(audio):
        raise ValueError(f"{folder} holds {len(audio)} embeddings, but {len(rows)} rows of pairs.csv.")
    texts = [[row[f"caption_{number}"] for number in range(2, 2 + _NUM_CAPTIONS)] for row in rows]
    captions = [[re.findall(r"[a-z']+", text.lower()) for text in listed] for listed in texts]
    shares = [size / sum(_SPLIT_SIZES.values()) for size in _SPLIT_SIZES.values()]
    parts = split_by_clip([row["clip_id"] for row in rows], shares, seed=0)
    clips = dict(zip(_SPLIT_SIZES, map(np.array, parts), strict=True))

    counts = Counter(
        word for clip in clips["train"] for caption in captions[clip][:captions_per_clip] for word in caption
    )
    known = sorted(word for word, count in counts.items() if count >= _LEAST_OCCURRENCES)
    number_of = {word: number for number, word in enumerate(known, start=1)}  # 0 is padding

    def pairs(split: str, places: range) -> CaptionPairs:
        chosen = [(clip, place) for clip in clips[split] for place in places]
        words = [
            torch.tensor([number_of[word] for word in captions[clip][place] if word in number_of]).long()
            for clip, place in chosen
        ]
        clip_id, caption_id = (torch.tensor(numbers) for numbers in zip(*chosen, strict=True))
        padded = nn.utils.rnn.pad_sequence(words, batch_first=True)
        said = [texts[clip][place] for clip, place in chosen]
        return CaptionPairs(audio, padded, said, clip_id, caption_id)

    trained, all_places = range(captions_per_clip), range(_NUM_CAPTIONS)
    others = all_places[captions_per_clip:]
    return _Loaded(
        {split: pairs(split, trained if split == "train" else all_places) for split in _SPLIT_SIZES},
        pairs("train", others) if others else None,
        len(known) + 1,
    )


def _make_data(folder: Path, captions_per_clip: int, batch_size: int, seed: int) -> DatasetsDataModule:
    parts = _load(folder, captions_per_clip).parts
    return DatasetsDataModule(*parts.values(), batch_size=batch_size, seed=seed)


def _make_model(folder: Path, captions_per_clip: int, learning_rate: float) -> CaptionRetriever:
    loaded = _load(folder, captions_per_clip)
    return CaptionRetriever(loaded.parts["train"].audio.shape[1], loaded.num_words, learning_rate)


def _other_captions(folder: Path, captions_per_clip: int) -> CaptionPairs:
    """The training clips with the captions that the model does not train with."""
    others = _load(folder, captions_per_clip).others
    assert others is not None
    return others
