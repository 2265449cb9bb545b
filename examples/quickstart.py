"""Train a small retrieval model with four losses, and compare them fairly.

    python examples/quickstart.py                        # synthetic soundscapes, no download
    python examples/quickstart.py --data folder --root DIR --annotations clips.csv --caption-columns title

NT-Xent, NT-Xent with label smoothing, ASK as published, and the stored knowledge as teacher. The paper
fine-tunes pretrained encoders, and ASK's neighbours mean nothing to random ones: all losses start from the
same weights, pretrained with NT-Xent on other soundscapes (with `--data folder` on the training part), and
have the same batches, epochs, seeds and number of settings to choose from on the validation part. Prints test
recalls, by cosine similarity and in calibrated search; writes runs.csv, logs, checkpoints and comparison.png
to the output. A repeated command continues where the last one stopped.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import Dataset

from ask_lightning import ASKModule
from ask_lightning.data import DatasetsDataModule, FolderData, SoundscapeData
from ask_lightning.losses import NTXentLoss
from ask_lightning.models import TinyRetriever
from ask_lightning.reproduce import (
    LOSSES,
    MAIN_LOSSES,
    MAX_CANDIDATES,
    Protocol,
    compare,
    loss_methods,
    silence_lightning,
    write_report,
)


class Options(argparse.Namespace):
    """Parsed options, with a hash so that each process loads its data once."""

    def __hash__(self) -> int:
        return hash(repr(self))


def main() -> None:
    """Pretrain, compare, print the tables, draw the picture."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    with mistakes_in_one_line(options):
        datasets = load(options)
        make_loaders(options, options.seed).train_dataloader()
    sizes = ", ".join(f"{len(pairs)} {name}" for name, pairs in datasets.items())
    print(f"Audio–caption pairs: {sizes} ({time.perf_counter() - started:.0f} s to prepare)", flush=True)

    free = ("methods", "references", "candidates", "seed", "seeds", "jobs", "threads", "wandb", "output")
    protocol = Protocol(
        partial(make_loaders, options),
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        make_loggers=partial(wandb_loggers, options) if options.wandb else None,
        description={name: value for name, value in vars(options).items() if name not in free},
    )
    weights = pretrained_weights(options)
    methods = loss_methods(
        {name: LOSSES[name] for name in options.methods},
        partial(make_model, weights),
        learning_rate=options.learning_rate,
        num_candidates=options.candidates,
        refresh={"T": options.T, "num_prototypes": options.prototypes},
    )
    compared = compare(
        methods,
        protocol,
        options.output,
        seeds=range(options.seed, options.seed + options.seeds),
        jobs=options.jobs,
        threads=options.threads,
        log=partial(print, flush=True),
    )
    references = [name for name in options.references if name in options.methods]
    report = write_report(compared, options.output, references=references, refresh_every=options.T)
    print(f"\nTest recall in %; settings, epoch and calibration chosen on validation:\n\n{report}\n")
    print(f"{options.output}/comparison.png shows it. {time.perf_counter() - started:.0f} s in all.")


def make_model(weights: Path | None, learning_rate: float) -> TinyRetriever:
    """The model that every loss trains."""
    model = TinyRetriever(learning_rate=learning_rate)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def pretrained_weights(options: Options) -> Path | None:
    """A file of weights that NT-Xent pretrained, or None; made once for each output folder."""
    if not options.pretraining_epochs:
        return None
    path = options.output / f"pretrained-seed-{options.seed}.pt"
    if path.exists():
        return path
    started = time.perf_counter()
    torch.set_num_threads(options.threads)  # another number would round otherwise, and make other weights
    L.seed_everything(options.seed, verbose=False)
    model = TinyRetriever(learning_rate=options.learning_rate)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_epochs=options.pretraining_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    if options.data == "soundscapes":
        data = soundscapes(options, options.pretraining_scenes, scenes_seed=1)
    else:
        data = make_loaders(options, options.seed)
    trainer.fit(ASKModule(model, NTXentLoss(temperature=0.1)), data.train_dataloader())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(model.cpu().state_dict(), unfinished)
    unfinished.replace(path)
    seconds = time.perf_counter() - started
    print(f"Pretrained with NT-Xent for {options.pretraining_epochs} epochs ({seconds:.0f} s)", flush=True)
    return path


def make_loaders(options: Options, seed: int) -> DatasetsDataModule:
    """Loaders whose batches follow from a seed."""
    return DatasetsDataModule(*load(options).values(), batch_size=options.batch_size, seed=seed)


def soundscapes(options: Options, scenes: int, scenes_seed: int) -> SoundscapeData:
    """Synthetic soundscapes; other seeds make other scenes of the same kinds of sound."""
    return SoundscapeData(
        scenes,
        options.test_scenes,
        options.test_scenes,
        scenes_seed=scenes_seed,
        features="log_mel",
        batch_size=options.batch_size,
        seed=options.seed,
    )


@cache
def load(options: Options) -> dict[str, Dataset]:
    """The pairs of each part, made or read once in each process."""
    if options.data == "soundscapes":
        return soundscapes(options, options.scenes, scenes_seed=0).datasets
    if options.root is None or options.annotations is None:
        sys.exit("--data folder needs --root (the folder of audio files) and --annotations (the CSV).")
    return FolderData(
        options.root,
        options.annotations,
        filename_column=options.filename_column,
        caption_columns=options.caption_columns,
        clip_id_column=options.clip_id_column,
        delimiter=options.delimiter,
        seconds=options.seconds,
        features="log_mel",
        fractions=(0.7, 0.15, 0.15),
        cache="memory",
        batch_size=options.batch_size,
    ).datasets


@contextmanager
def mistakes_in_one_line(options: Options) -> Iterator[None]:
    """End the program with the message alone, which names options as they are written here."""

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups(default="")
        return f"`--{name.replace('_', '-')}{value}`" if name in vars(options) else match.group()

    try:
        yield
    except (ValueError, FileNotFoundError) as error:  # of the table, of the folder or of the audio
        sys.exit(" ".join(re.sub(r"`(\w+)(=[^`]*)?`", flag, str(error)).split()))


def wandb_loggers(options: Options, name: str) -> list[WandbLogger]:
    """Weights & Biases besides the CSV."""
    try:
        return [WandbLogger(name=name, project="ask-lightning-quickstart", save_dir=options.output)]
    except ModuleNotFoundError as error:
        sys.exit(f'--wandb needs wandb: pip install "ask-lightning[track]" ({error}).')


def parse_arguments() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = tuple(LOSSES)
    add("--data", choices=("soundscapes", "folder"), default="soundscapes", help="synthetic or your own")
    add("--scenes", type=int, default=400, help="training soundscapes")
    add("--test-scenes", type=int, default=200, help="soundscapes to validate, and as many to test")
    add("--pretraining-scenes", type=int, default=1200, help="other soundscapes, to pretrain on")
    add("--root", type=Path, help="folder of audio files")
    add("--annotations", type=Path, help="CSV with a row for each audio–caption pair")
    add("--filename-column", default="filename", help="its column of file names, relative to --root")
    add("--caption-columns", nargs="+", default=["caption"], help="its columns of captions")
    add("--clip-id-column", help="its column of clip ids, which splits keep together (default: the file)")
    add("--delimiter", default=",", help="character between its fields")
    add("--seconds", type=float, default=5.0, help="length that clips are cropped or filled up to")
    add("--methods", nargs="+", choices=names, default=MAIN_LOSSES, help="losses to compare")
    add("--references", nargs="+", choices=names, default=MAIN_LOSSES[:2], help="losses to subtract")
    add("--pretraining-epochs", type=int, default=6, help="epochs of NT-Xent before; 0: random weights")
    add("--epochs", type=int, default=10, help="epochs of each run")
    add("--T", type=int, default=3, help="epochs between refreshes of the knowledge")
    add("--prototypes", type=int, default=64, help="number of coarse prototypes")
    add(
        "--candidates",
        type=int,
        choices=range(1, MAX_CANDIDATES + 1),
        default=4,
        help="settings that each loss tries; from the seventh on other learning rates",
    )
    add("--seeds", type=int, default=5, help="runs of each loss with its chosen settings")
    add("--seed", type=int, default=0, help="the first seed, on which settings are chosen")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    add("--accelerator", default="cpu", help="cpu, gpu, mps or auto")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--threads", type=int, default=1, help="CPU threads of each run")
    add("--wandb", action="store_true", help="log to Weights & Biases as well (WANDB_MODE=offline works)")
    add("--output", type=Path, default=Path("runs/quickstart"), help="where logs, checkpoints, picture go")
    return parser.parse_args(namespace=Options())


if __name__ == "__main__":
    main()
