"""Compare losses on a real caption-to-caption task that trains in a minute or two on one CPU core.

    python examples/caption_retrieval.py --data clotho_captions --seeds 5 --jobs 2

The sentence embedding of a clip's first caption plays the audio; captions 2 to 5 are the text. The folder
holds `caption_1_embeddings.npy`, of shape (clips, width), and `pairs.csv` with a row for each clip, in the
same order, and the columns `clip_id` and `caption_2` … `caption_5`.

All losses have the same model, batches, epochs, seeds and number of settings to choose from, learning rate
included, which is done on the validation part.
"""

import argparse
import csv
import re
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from ask_lightning.data import DatasetsDataModule, split_by_clip
from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.reproduce import (
    LOSSES,
    MAIN_LOSSES,
    MAX_CANDIDATES,
    Protocol,
    compare,
    loss_methods,
    mean_recall,
    silence_lightning,
    write_report,
)

# Of Clotho's 3,839 development clips; another number of clips is divided in proportion.
SPLIT_SIZES = {"train": 2639, "val": 500, "test": 700}
NUM_CAPTIONS = 4
LEAST_OCCURRENCES = 3


class CaptionPairs(Dataset):
    """Pairs of a first caption's embedding and another caption's words."""

    def __init__(self, audio: Tensor, words: Tensor, clip_id: Tensor) -> None:
        self.audio, self.words, self.clip_id = audio, words, clip_id

    def __len__(self) -> int:
        return len(self.clip_id)

    def __getitem__(self, row: int) -> dict:
        return {"audio": self.audio[row], "words": self.words[row], "clip_id": self.clip_id[row]}


class CaptionRetriever(L.LightningModule):
    """A head over sentence embeddings, and another over an average of word vectors."""

    def __init__(self, audio_width: int, num_words: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.audio_head = self.head(audio_width)
        self.word_vectors = nn.EmbeddingBag(num_words, 300, mode="mean", padding_idx=0)
        self.text_head = self.head(300)
        self.val_metrics = AudioTextRetrieval()

    @staticmethod
    def head(incoming: int) -> nn.Module:
        return nn.Sequential(nn.Linear(incoming, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 256))

    def encode_audio(self, batch: dict) -> Tensor:
        return normalize(self.audio_head(batch["audio"]), dim=1)

    def encode_text(self, batch: dict) -> Tensor:
        return normalize(self.text_head(self.word_vectors(batch["words"])), dim=1)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.val_metrics.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        self.log("val/mean_recall", mean_recall(self.val_metrics.compute()))
        self.val_metrics.reset()

    def configure_optimizers(self) -> dict:
        # The fused step is three times as fast here, where most weights are word vectors.
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


@cache
def load(folder: Path, captions_per_clip: int) -> tuple[dict[str, CaptionPairs], int]:
    """Read the task and divide its clips; also returns the size of the vocabulary."""
    audio = torch.from_numpy(np.load(folder / "caption_1_embeddings.npy")).float()
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if len(rows) != len(audio):
        raise SystemExit(f"{folder} holds {len(audio)} embeddings, but {len(rows)} rows of pairs.csv.")
    captions = [
        [re.findall(r"[a-z']+", row[f"caption_{number}"].lower()) for number in range(2, 2 + NUM_CAPTIONS)]
        for row in rows
    ]
    shares = [size / sum(SPLIT_SIZES.values()) for size in SPLIT_SIZES.values()]
    parts = split_by_clip([row["clip_id"] for row in rows], shares, seed=0)
    clips = dict(zip(SPLIT_SIZES, map(np.array, parts), strict=True))

    counts = Counter(
        word for clip in clips["train"] for caption in captions[clip][:captions_per_clip] for word in caption
    )
    known = sorted(word for word, count in counts.items() if count >= LEAST_OCCURRENCES)
    number_of = {word: number for number, word in enumerate(known, start=1)}  # 0 is padding

    def pairs(split: str) -> CaptionPairs:
        taken = captions_per_clip if split == "train" else NUM_CAPTIONS
        texts = [captions[clip][place] for clip in clips[split] for place in range(taken)]
        words = [torch.tensor([number_of[word] for word in text if word in number_of]) for text in texts]
        clip_id = torch.from_numpy(np.repeat(clips[split], taken))
        padded = nn.utils.rnn.pad_sequence([ids.long() for ids in words], batch_first=True)
        return CaptionPairs(audio[clip_id], padded, clip_id)

    return {split: pairs(split) for split in SPLIT_SIZES}, len(known) + 1


def make_data(options: argparse.Namespace, seed: int) -> DatasetsDataModule:
    """Loaders whose batches follow from a seed."""
    datasets, _ = load(options.data, options.captions_per_clip)
    return DatasetsDataModule(*datasets.values(), batch_size=options.batch_size, seed=seed)


def make_model(folder: Path, captions_per_clip: int, learning_rate: float) -> CaptionRetriever:
    """A new model for the task."""
    datasets, num_words = load(folder, captions_per_clip)
    return CaptionRetriever(datasets["train"].audio.shape[1], num_words, learning_rate)


def main() -> None:
    """Compare and print the tables."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    datasets, num_words = load(options.data, options.captions_per_clip)
    sizes = ", ".join(f"{len(pairs)} {split}" for split, pairs in datasets.items())
    print(f"Pairs: {sizes}; {num_words - 1} words.", flush=True)
    methods = loss_methods(
        options.methods,
        partial(make_model, options.data, options.captions_per_clip),
        learning_rate=1e-3,
        num_candidates=options.candidates,
        refresh={"T": options.T},
    )
    protocol = Protocol(
        partial(make_data, options),
        max_epochs=options.epochs,
        description={
            "captions_per_clip": options.captions_per_clip,
            "batch_size": options.batch_size,
            "T": options.T,
        },
    )
    compared = compare(
        methods,
        protocol,
        options.output,
        seeds=range(options.seeds),
        jobs=options.jobs,
        log=partial(print, flush=True),
    )
    references = [name for name in options.references if name in options.methods]
    report = write_report(compared, options.output, references=references, refresh_every=options.T)
    print(f"\nTest recall in %; settings, epoch and calibration chosen on validation:\n\n{report}\n")
    print(f"{options.output} has every run and a picture; {time.perf_counter() - started:.0f} s in all.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = tuple(LOSSES)
    add("--data", type=Path, required=True, help="folder of caption_1_embeddings.npy and pairs.csv")
    add("--captions-per-clip", type=int, choices=(4, 1), default=4, help="captions of a training clip")
    add("--methods", nargs="+", choices=names, default=MAIN_LOSSES, help="losses to compare")
    add("--references", nargs="+", choices=names, default=MAIN_LOSSES[:2], help="losses to subtract")
    add(
        "--candidates",
        type=int,
        choices=range(1, MAX_CANDIDATES + 1),
        default=MAX_CANDIDATES,
        help="settings that each loss tries",
    )
    add("--seeds", type=int, default=5, help="runs of each method with its chosen settings")
    add("--epochs", type=int, default=30, help="epochs of each run")
    add("--T", type=int, default=15, help="epochs between refreshes of the knowledge")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--jobs", type=int, default=1, help="runs at a time, on one CPU thread each")
    add("--output", type=Path, default=Path("runs/captions"), help="folder of runs, logs and checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
