"""Compare losses on precomputed embeddings: projection heads over two frozen encoders.

    python examples/frozen_embeddings.py --audio audio.npy --text text.npy --pairs pairs.csv --seeds 5

Row i of both arrays is one audio–caption pair; the CSV has a row for each with the id of its clip. The
split keeps all rows of a clip together, and every caption of a query's clip counts as correct.
"""

import argparse
import csv
import time
from collections.abc import Mapping
from functools import partial
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


class FrozenPairs(Dataset):
    """Audio–text pairs: rows of the two arrays."""

    def __init__(self, audio: Tensor, text: Tensor, clip_id: Tensor) -> None:
        self.audio, self.text, self.clip_id = audio, text, clip_id

    def __len__(self) -> int:
        return len(self.clip_id)

    def __getitem__(self, row: int) -> dict:
        return {"audio": self.audio[row], "text": self.text[row], "clip_id": self.clip_id[row]}


class ProjectionHeads(L.LightningModule):
    """Two small heads."""

    def __init__(self, audio_width: int, text_width: int, width: int, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.audio_head = self.head(audio_width, width)
        self.text_head = self.head(text_width, width)
        self.val_metrics = AudioTextRetrieval()

    @staticmethod
    def head(incoming: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(incoming, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width))

    def encode_audio(self, batch: dict) -> Tensor:
        return normalize(self.audio_head(batch["audio"]), dim=1)

    def encode_text(self, batch: dict) -> Tensor:
        return normalize(self.text_head(batch["text"]), dim=1)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.val_metrics.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        scores = self.val_metrics.compute()
        self.val_metrics.reset()
        scores["mean_recall"] = mean_recall(scores)
        self.log_dict({f"val/{name}": score for name, score in scores.items()})

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Compare, print the table, draw the picture."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    datasets = load(options)
    print("Pairs: " + ", ".join(f"{len(part)} {name}" for name, part in datasets.items()), flush=True)
    widths = datasets["train"].audio.shape[1], datasets["train"].text.shape[1]
    methods = loss_methods(
        options.methods,
        partial(ProjectionHeads, *widths, options.width),
        learning_rate=options.learning_rate,
        num_candidates=options.candidates,
        refresh={"T": options.T, "num_prototypes": options.prototypes},
    )
    free = ("methods", "references", "candidates", "seeds", "jobs", "threads", "output")
    protocol = Protocol(
        partial(make_loaders, datasets, options),
        max_epochs=options.epochs,
        description={name: value for name, value in vars(options).items() if name not in free},
    )
    compared = compare(
        methods,
        protocol,
        options.output,
        seeds=range(options.seeds),
        jobs=options.jobs,
        threads=options.threads,
    )
    references = [name for name in options.references if name in options.methods]
    report = write_report(compared, options.output, references=references, refresh_every=options.T)
    print(f"\nTest recall in %; settings, epoch and calibration chosen on validation:\n\n{report}\n")
    print(f"{options.output}/comparison.png; {time.perf_counter() - started:.0f} s in all.")


def make_loaders(
    datasets: Mapping[str, FrozenPairs], options: argparse.Namespace, seed: int
) -> DatasetsDataModule:
    """Loaders whose batches follow from a seed."""
    return DatasetsDataModule(*datasets.values(), batch_size=options.batch_size, seed=seed)


def load(options: argparse.Namespace) -> dict[str, FrozenPairs]:
    """Read the arrays and split them so that no clip is in two parts."""
    audio, text = (torch.from_numpy(np.load(path)).float() for path in (options.audio, options.text))
    with open(options.pairs, newline="", encoding="utf-8") as lines:
        clips = [row[options.clip_id_column] for row in csv.DictReader(lines)]
    if not len(audio) == len(text) == len(clips):
        raise SystemExit(
            f"The rows do not match: {len(audio)} of {options.audio}, {len(text)} of {options.text}, "
            f"{len(clips)} of {options.pairs}."
        )
    number = {clip: position for position, clip in enumerate(dict.fromkeys(clips))}
    clip_id = torch.tensor([number[clip] for clip in clips])
    parts = split_by_clip(clip_id.tolist(), (0.7, 0.15, 0.15), options.split_seed)
    return {
        name: FrozenPairs(audio[rows], text[rows], clip_id[rows])
        for name, rows in zip(("train", "val", "test"), map(torch.tensor, parts), strict=True)
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = tuple(LOSSES)
    add("--audio", type=Path, required=True, help="audio embeddings, .npy of shape (pairs, width)")
    add("--text", type=Path, required=True, help="text embeddings, .npy of shape (pairs, width)")
    add("--pairs", type=Path, required=True, help="CSV with a row for each pair, in the arrays' order")
    add("--clip-id-column", default="clip_id", help="column of clip ids in the CSV")
    add("--split-seed", type=int, default=0, help="seed of the split into train, validation and test")
    add("--width", type=int, default=256, help="width of the shared embedding space")
    add("--methods", nargs="+", choices=names, default=MAIN_LOSSES, help="losses to compare")
    add("--references", nargs="+", choices=names, default=MAIN_LOSSES[:2], help="losses to subtract")
    add("--epochs", type=int, default=30, help="epochs of each run")
    add("--T", type=int, default=5, help="epochs between refreshes of the knowledge")
    add("--prototypes", type=int, default=64, help="number of coarse prototypes")
    add(
        "--candidates",
        type=int,
        choices=range(1, MAX_CANDIDATES + 1),
        default=MAX_CANDIDATES,
        help="settings that each loss tries",
    )
    add("--seeds", type=int, default=5, help="runs of each loss with its chosen settings")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--learning-rate", type=float, default=1e-3, help="learning rate around which it is tuned")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=1, help="CPU threads of each run")
    add("--output", type=Path, default=Path("runs/frozen"), help="where logs, checkpoints, picture go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
