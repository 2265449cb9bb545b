"""Compare losses on a real caption-to-caption task that trains in a minute or two on one CPU core.

    python examples/caption_retrieval.py --data clotho_captions --seeds 5 --jobs 2

The sentence embedding of a clip's first caption plays the audio; captions 2 to 5 are the text. The folder
holds `caption_1_embeddings.npy`, of shape (clips, width), and `pairs.csv` with a row for each clip, in the
same order, and the columns `clip_id` and `caption_2` … `caption_5`.

All losses have the same model, batches, epochs, seeds and number of settings to choose from, learning rate
included, which is done on the validation part.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from ask_lightning.reproduce import LOSSES, MAIN_LOSSES, MAX_CANDIDATES, compare_losses, silence_lightning
from ask_lightning.reproduce.tasks import captions_task


def main() -> None:
    """Compare, print the tables, draw the picture."""
    options = parse_arguments()
    silence_lightning()
    started = time.perf_counter()
    task = captions_task(
        options.data,
        captions_per_clip=options.captions_per_clip,
        batch_size=options.batch_size,
        max_epochs=options.epochs,
        T=options.T,
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
    add("--seeds", type=int, default=5, help="runs of each loss with its chosen settings")
    add("--epochs", type=int, default=30, help="epochs of each run")
    add("--T", type=int, default=15, help="epochs between refreshes of the knowledge")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--jobs", type=int, default=1, help="runs at a time, on one CPU thread each")
    add("--output", type=Path, default=Path("runs/captions"), help="folder of runs, logs and checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
