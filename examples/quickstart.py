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
from functools import partial
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from ask_lightning.reproduce import (
    LOSSES,
    MAIN_LOSSES,
    MAX_CANDIDATES,
    RunsError,
    compare_losses,
    silence_lightning,
)
from ask_lightning.reproduce.tasks import Task, folder_task, soundscapes_task


def main() -> None:
    """Pretrain, compare, print the tables, draw the picture."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    with mistakes_in_one_line(options):
        task = make_task(options)
        sizes = task.sizes()
        task.make_data(options.seed).train_dataloader()
    print(f"Audio–caption pairs: {sizes} ({time.perf_counter() - started:.0f} s to prepare)", flush=True)
    try:
        report = compare_losses(
            task,
            options.methods,
            options.output,
            references=options.references,
            num_candidates=options.candidates,
            seeds=range(options.seed, options.seed + options.seeds),
            jobs=options.jobs,
            threads=options.threads,
            make_loggers=partial(wandb_loggers, options) if options.wandb else None,
            log=partial(print, flush=True),
        )
    except RunsError as error:  # of another command in the same folder
        sys.exit(str(error))
    print(f"\nTest recall in %; settings, epoch and calibration chosen on validation:\n\n{report}\n")
    print(f"{options.output}/comparison.png shows it. {time.perf_counter() - started:.0f} s in all.")


def make_task(options: argparse.Namespace) -> Task:
    """The data, the model that every loss trains, and its schedule."""
    common = {
        "pretraining_epochs": options.pretraining_epochs,
        "pretraining_seed": options.seed,
        "pretraining_folder": options.output,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "max_epochs": options.epochs,
        "T": options.T,
        "num_prototypes": options.prototypes,
        "accelerator": options.accelerator,
    }
    if options.data == "soundscapes":
        return soundscapes_task(
            scenes=options.scenes,
            test_scenes=options.test_scenes,
            pretraining_scenes=options.pretraining_scenes,
            **common,
        )
    if options.root is None or options.annotations is None:
        sys.exit("--data folder needs --root (the folder of audio files) and --annotations (the CSV).")
    return folder_task(
        options.root,
        options.annotations,
        filename_column=options.filename_column,
        caption_columns=options.caption_columns,
        clip_id_column=options.clip_id_column,
        delimiter=options.delimiter,
        seconds=options.seconds,
        **common,
    )


@contextmanager
def mistakes_in_one_line(options: argparse.Namespace) -> Iterator[None]:
    """End the program with the message alone, which names options as they are written here."""

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups(default="")
        return f"`--{name.replace('_', '-')}{value}`" if name in vars(options) else match.group()

    try:
        yield
    except (ValueError, FileNotFoundError) as error:  # of the table, of the folder or of the audio
        sys.exit(" ".join(re.sub(r"`(\w+)(=[^`]*)?`", flag, str(error)).split()))


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
    names = tuple(LOSSES)
    add("--data", choices=("soundscapes", "folder"), default="soundscapes", help="synthetic or your own")
    add("--scenes", type=int, default=400, help="training soundscapes")
    add("--test-scenes", type=int, default=200, help="soundscapes to validate, and as many to test")
    add("--pretraining-scenes", type=int, default=1200, help="other soundscapes, to pretrain on")
    add("--root", type=Path, help="folder of audio files")
    add("--annotations", type=Path, help="CSV with a row for each audio–caption pair")
    add("--filename-column", default="auto", help="its column of file names, relative to --root")
    add("--caption-columns", nargs="+", default=["caption"], help="its columns of captions")
    add("--clip-id-column", default="auto", help="its column of clip ids, which splits keep together")
    add("--delimiter", default="auto", help="character between its fields")
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
    return parser.parse_args()


if __name__ == "__main__":
    main()
