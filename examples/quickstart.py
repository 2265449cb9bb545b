"""Train a small retrieval model with plain NT-Xent and with ASK, and compare the two fairly.

    python examples/quickstart.py                        # synthetic soundscapes, no download
    python examples/quickstart.py --data folder --root DIR --annotations clips.csv --caption-columns title

Both methods get the same weights, batches and epochs, and choose their temperature from the same grid on
the validation part. Prints test recalls; writes runs.csv, logs, checkpoints and comparison.png to the output.
A repeated command continues where the last one stopped.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import Dataset

from ask_lightning import ASKModule, DriftMonitor, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.data import DatasetsDataModule, FolderData, RetrievalDataModule, SoundscapeData
from ask_lightning.models import TinyRetriever
from ask_lightning.reproduce import (
    Method,
    Protocol,
    compare,
    comparison_markdown,
    comparison_picture,
    silence_lightning,
)

METHODS = ("NT-Xent", "ASK", "ASK-detached")


def main() -> None:
    """Compare, print the table, draw the picture."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    datasets = make_data(options).datasets
    sizes = ", ".join(f"{len(pairs)} {name}" for name, pairs in datasets.items())
    print(f"Audio–caption pairs: {sizes} ({time.perf_counter() - started:.0f} s to prepare)", flush=True)

    methods = [
        Method(
            name,
            tuple({"temperature": temperature} for temperature in options.tune),
            partial(build, name, datasets, options),
        )
        for name in options.methods
    ]
    free = ("methods", "tune", "seed", "seeds", "jobs", "threads", "wandb", "output")
    protocol = Protocol(
        partial(make_loaders, datasets, options),
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        make_loggers=partial(wandb_loggers, options) if options.wandb else None,
        description={name: value for name, value in vars(options).items() if name not in free},
    )
    compared = compare(
        methods,
        protocol,
        options.output,
        seeds=range(options.seed, options.seed + options.seeds),
        jobs=options.jobs,
        threads=options.threads,
    )
    picture = options.output / "comparison.png"
    comparison_picture(compared, picture, refresh_every=options.T)
    table = comparison_markdown(compared)
    (options.output / "comparison.md").write_text(table + "\n")
    print(f"\nTest recall in %; temperature, epoch and calibration chosen on validation:\n\n{table}\n")
    print(f"{picture} shows how it came about. {time.perf_counter() - started:.0f} s in all.")


def make_loaders(
    datasets: Mapping[str, Dataset], options: argparse.Namespace, seed: int
) -> DatasetsDataModule:
    """Loaders whose batches follow from a seed."""
    return DatasetsDataModule(*datasets.values(), batch_size=options.batch_size, seed=seed)


def build(
    name: str, datasets: Mapping[str, Dataset], options: argparse.Namespace, settings: Mapping[str, Any]
) -> tuple[L.LightningModule, list[L.Callback]]:
    """The model as it is, or the same model in an `ASKModule`."""
    temperature = settings["temperature"]
    model = TinyRetriever(temperature=temperature, learning_rate=options.learning_rate)
    if name == "NT-Xent":
        return model, []
    loss = ReliabilityOTLoss(temperature=temperature, modulation_gradient=name == "ASK")
    source = make_loaders(datasets, options, seed=0).knowledge_dataset
    refresh = KnowledgeRefreshCallback(options.T, source, num_prototypes=options.prototypes)
    return ASKModule(model, loss), [refresh, DriftMonitor()]


def make_data(options: argparse.Namespace) -> RetrievalDataModule:
    """The pairs to train and judge on."""
    if options.data == "soundscapes":
        held_out = max(options.scenes // 5, options.batch_size)
        return SoundscapeData(
            options.scenes, held_out, held_out, features="log_mel", batch_size=options.batch_size
        )
    if options.root is None or options.annotations is None:
        sys.exit("--data folder needs --root (the folder of audio files) and --annotations (the CSV).")
    return FolderData(
        options.root,
        options.annotations,
        filename_column=options.filename_column,
        caption_columns=options.caption_columns,
        clip_id_column=options.clip_id_column,
        seconds=options.seconds,
        features="log_mel",
        fractions=(0.7, 0.15, 0.15),
        cache="memory",
        batch_size=options.batch_size,
    )


def wandb_loggers(options: argparse.Namespace, name: str) -> list[WandbLogger]:
    """Weights & Biases besides the CSV."""
    try:
        return [WandbLogger(name=name, project="ask-lightning-quickstart", save_dir=options.output)]
    except ModuleNotFoundError as error:
        sys.exit(f'--wandb needs wandb: pip install "ask-lightning[track]" ({error}).')


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("soundscapes", "folder"), default="soundscapes", help="synthetic or your own")
    add("--scenes", type=int, default=1500, help="training soundscapes; a fifth each to validate and test")
    add("--root", type=Path, help="folder of audio files")
    add("--annotations", type=Path, help="CSV with a row for each audio–caption pair")
    add("--filename-column", default="filename", help="its column of file names, relative to --root")
    add("--caption-columns", nargs="+", default=["caption"], help="its columns of captions")
    add("--clip-id-column", help="its column of clip ids, which splits keep together (default: the file)")
    add("--seconds", type=float, default=5.0, help="length that clips are cropped or filled up to")
    add("--methods", nargs="+", choices=METHODS, default=METHODS[:2], help="ASK-detached: constant factor")
    add("--epochs", type=int, default=10, help="of each run")
    add("--T", type=int, default=3, help="epochs between refreshes of the knowledge")
    add("--prototypes", type=int, default=64, help="number of coarse prototypes")
    add("--tune", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="temperatures that both choose from")
    add("--seeds", type=int, default=1, help="runs of each method with its chosen temperature")
    add("--seed", type=int, default=0, help="the first seed, on which temperatures are chosen")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--learning-rate", type=float, default=2e-3, help="peak learning rate of both methods")
    add("--accelerator", default="cpu", help="cpu, gpu, mps or auto")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--threads", type=int, default=2, help="CPU threads of each run")
    add("--wandb", action="store_true", help="log to Weights & Biases as well (WANDB_MODE=offline works)")
    add("--output", type=Path, default=Path("runs/quickstart"), help="where logs, checkpoints, picture go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
