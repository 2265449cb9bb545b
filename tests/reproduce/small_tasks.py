"""A task whose runs take a fraction of a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ask_lightning.reproduce.tasks import embeddings_task

NUM_PAIRS = 60


def write_pairs(folder: Path) -> dict[str, Path]:
    """Embeddings of pairs that belong together, and their clips."""
    random = np.random.default_rng(0)
    audio = random.normal(size=(NUM_PAIRS, 12)).astype("float32")
    text = audio @ random.normal(size=(12, 8)).astype("float32")
    np.save(folder / "audio.npy", audio)
    np.save(folder / "text.npy", text)
    lines = ["clip_id", *(f"clip {number}" for number in range(NUM_PAIRS))]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return {"audio": folder / "audio.npy", "text": folder / "text.npy", "pairs": folder / "pairs.csv"}


def small_task(folder: Path, **options):
    """The task, with a second domain that is the same as the first."""
    arguments = {"width": 8, "batch_size": 14, "max_epochs": 2, "T": 1, "num_prototypes": 4} | options
    task = embeddings_task(**write_pairs(folder), **arguments)
    return replace(task, transfer={"the same": task.make_data})
