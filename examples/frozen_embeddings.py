"""Compare losses on precomputed embeddings: projection heads over two frozen encoders.

    python examples/frozen_embeddings.py --audio audio.npy --text text.npy --pairs pairs.csv --seeds 5

Row i of both arrays is one audio–caption pair; the CSV has a row for each with the id of its clip. The
split keeps all rows of a clip together, and every caption of a query's clip counts as correct.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from ask_lightning.reproduce import LOSSES, MAIN_LOSSES, MAX_CANDIDATES, compare_losses, silence_lightning
from ask_lightning.reproduce.tasks import embeddings_task


def main() -> None:
    """Compare, print the tables, draw the picture."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    task = embeddings_task(
        options.audio,
        options.text,
        options.pairs,
        clip_id_column=options.clip_id_column,
        split_seed=options.split_seed,
        width=options.width,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_epochs=options.epochs,
        T=options.T,
        num_prototypes=options.prototypes,
    )
    print(f"Pairs: {task.sizes()}.", flush=True)
    report = compare_losses(
        task,
        options.methods,
        options.output,
        references=options.references,
        num_candidates=options.candidates,
        seeds=range(options.seeds),
        jobs=options.jobs,
        threads=options.threads,
        log=partial(print, flush=True),
    )
    print(f"\nTest recall in %; settings, epoch and calibration chosen on validation:\n\n{report}\n")
    print(f"{options.output} has every run and a picture; {time.perf_counter() - started:.0f} s in all.")


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
