"""Compare NT-Xent and ASK on precomputed embeddings: projection heads over two frozen encoders.

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
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from ask_lightning import ASKModule, DriftMonitor, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.data import DatasetsDataModule, split_by_clip
from ask_lightning.functional import nt_xent
from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.reproduce import (
    Method,
    Protocol,
    compare,
    comparison_markdown,
    comparison_picture,
    mean_recall,
    silence_lightning,
)

METHODS = ("NT-Xent", "ASK", "ASK-detached")


class FrozenPairs(Dataset):
    """Audio–text pairs: rows of the two arrays."""

    def __init__(self, audio: Tensor, text: Tensor, clip_id: Tensor) -> None:
        self.audio, self.text, self.clip_id = audio, text, clip_id

    def __len__(self) -> int:
        return len(self.clip_id)

    def __getitem__(self, row: int) -> dict:
        return {"audio": self.audio[row], "text": self.text[row], "clip_id": self.clip_id[row]}


class ProjectionHeads(L.LightningModule):
    """Two small heads trained with plain NT-Xent: a complete model without any code for ASK."""

    def __init__(
        self, audio_width: int, text_width: int, *, width: int, temperature: float, learning_rate: float
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
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

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        similarity = self.encode_text(batch) @ self.encode_audio(batch).T
        temperature = self.hparams["temperature"]
        loss = 0.5 * (nt_xent(similarity, temperature) + nt_xent(similarity.T, temperature))
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.val_metrics.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"])

    def on_validation_epoch_end(self) -> None:
        scores = self.val_metrics.compute()
        self.val_metrics.reset()
        scores["mean_recall"] = mean_recall(scores)
        self.log_dict({f"val/{name}": score for name, score in scores.items()})

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], weight_decay=1e-2)
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
    methods = [
        Method(
            name,
            tuple({"temperature": temperature} for temperature in options.tune),
            partial(build, name, widths, options),
        )
        for name in options.methods
    ]
    free = ("methods", "tune", "seeds", "jobs", "threads", "output")
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
    comparison_picture(compared, options.output / "comparison.png", refresh_every=options.T)
    table = comparison_markdown(compared)
    (options.output / "comparison.md").write_text(table + "\n")
    print(f"\nTest recall in %; temperature, epoch and calibration chosen on validation:\n\n{table}\n")
    print(f"{options.output}/comparison.png; {time.perf_counter() - started:.0f} s in all.")


def make_loaders(
    datasets: Mapping[str, FrozenPairs], options: argparse.Namespace, seed: int
) -> DatasetsDataModule:
    """Loaders whose batches follow from a seed."""
    return DatasetsDataModule(*datasets.values(), batch_size=options.batch_size, seed=seed)


def build(
    name: str, widths: tuple[int, int], options: argparse.Namespace, settings: Mapping[str, Any]
) -> tuple[L.LightningModule, list[L.Callback]]:
    """The heads as they are, or the same heads in an `ASKModule`."""
    temperature = settings["temperature"]
    heads = ProjectionHeads(
        *widths, width=options.width, temperature=temperature, learning_rate=options.learning_rate
    )
    if name == "NT-Xent":
        return heads, []
    loss = ReliabilityOTLoss(
        temperature=temperature, plan_scaling=options.plan_scaling, modulation_gradient=name == "ASK"
    )
    refresh = KnowledgeRefreshCallback(T=options.T, num_prototypes=options.prototypes)
    return ASKModule(heads, loss), [refresh, DriftMonitor()]


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
    add("--audio", type=Path, required=True, help="audio embeddings, .npy of shape (pairs, width)")
    add("--text", type=Path, required=True, help="text embeddings, .npy of shape (pairs, width)")
    add("--pairs", type=Path, required=True, help="CSV with a row for each pair, in the arrays' order")
    add("--clip-id-column", default="clip_id", help="column of clip ids in the CSV")
    add("--split-seed", type=int, default=0, help="seed of the split into train, validation and test")
    add("--width", type=int, default=256, help="width of the shared embedding space")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="ASK-detached: constant factor")
    add("--epochs", type=int, default=30, help="epochs of each run")
    add("--T", type=int, default=5, help="epochs between refreshes of the knowledge")
    add("--prototypes", type=int, default=64, help="number of coarse prototypes")
    add("--plan-scaling", choices=("marginal", "row"), default="marginal", help="scaling of ASK's plan")
    add("--tune", type=float, nargs="+", default=[0.03, 0.05, 0.07, 0.1, 0.2], help="temperatures to try")
    add("--seeds", type=int, default=5, help="runs of each method with its chosen temperature")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--learning-rate", type=float, default=1e-3, help="learning rate of both methods")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=1, help="CPU threads of each run")
    add("--output", type=Path, default=Path("runs/frozen"), help="where logs, checkpoints, picture go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
