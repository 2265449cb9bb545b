"""What a large batch costs in memory and time: as a whole, and in chunks of several sizes.

    python benchmarks/large_batches.py

prints a Markdown table. Steps of all sizes are timed in turn in one process, as minima over rounds. The
memory is that of processes of their own, one for each size: how far their peak rises above what they held
before the step, which is the model and the batch.
"""

import argparse
import logging
import multiprocessing
import resource
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from ask_lightning import ASKModule, NTXentLoss
from ask_lightning.utilities.text_tables import markdown_table


class Transformers(pl.LightningModule):
    """Two small transformers over frames and words, whose mean is the embedding."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.audio, self.text = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True),
                layers,
                enable_nested_tensor=False,
            )
            for _ in range(2)
        )

    def encode_audio(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean over frames, `(B, d)`."""
        embeddings: Tensor = self.audio(batch["audio"]).mean(dim=1)
        return embeddings

    def encode_text(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean over words, `(B, d)`."""
        embeddings: Tensor = self.text(batch["text"]).mean(dim=1)
        return embeddings


def make_module(options: argparse.Namespace, chunk_size: int | None) -> ASKModule:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # what the trainer says of itself
    torch.manual_seed(0)
    model = Transformers(options.width, options.layers)
    module = ASKModule(model, NTXentLoss(), step="encode", chunk_size=chunk_size)
    module.trainer = pl.Trainer(logger=False, barebones=True, accelerator="cpu")
    return module


def make_batch(options: argparse.Namespace) -> dict[str, Tensor]:
    frames, words = options.frames, options.words
    return {
        "audio": torch.randn(options.batch, frames, options.width),
        "text": torch.randn(options.batch, words, options.width),
    }


def step(module: ASKModule, batch: dict[str, Tensor]) -> float:
    """Seconds of a loss with its gradient."""
    started = time.perf_counter()
    module.zero_grad()
    module.training_step(batch).backward()
    return time.perf_counter() - started


def memory(options: argparse.Namespace, chunk_size: int | None, results: Any) -> None:
    """Put the MiB by which the peak of this process rises in a step into a queue."""
    torch.set_num_threads(options.threads)
    module, batch = make_module(options, chunk_size), make_batch(options)
    step(module, {name: side[:2] for name, side in batch.items()})  # what is allocated once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(module, batch)
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="B, pairs in a batch")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 32, 16, 8], help="chunk sizes")
    parser.add_argument("--width", type=int, default=128, help="width of the encoders")
    parser.add_argument("--layers", type=int, default=4, help="layers of each encoder")
    parser.add_argument("--frames", type=int, default=64, help="frames of a clip")
    parser.add_argument("--words", type=int, default=16, help="words of a caption")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=2, help="rounds, of which the best counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [None, *options.chunks]

    context = multiprocessing.get_context("spawn")
    peaks, best = {}, dict.fromkeys(sizes, float("inf"))
    for size in sizes:
        results = context.Queue()
        process = context.Process(target=memory, args=(options, size, results))
        process.start()
        peaks[size] = results.get()
        process.join()
    batch, modules = make_batch(options), {size: make_module(options, size) for size in sizes}
    for _ in range(options.repetitions):
        for size, module in modules.items():
            best[size] = min(best[size], step(module, batch))

    print(
        f"\nA step of B = {options.batch}, two transformers of {options.layers} layers and width "
        f"{options.width}, {options.frames} frames, {options.words} words, CPU, {options.threads} threads\n"
    )
    rows = [
        [
            "whole" if size is None else size,
            f"{peaks[size]:.0f}",
            f"{peaks[size] / peaks[None]:.3f}",
            f"{best[size]:.2f}",
            f"{best[size] / best[None]:.2f}",
        ]
        for size in sizes
    ]
    print(markdown_table(["chunk_size", "peak memory (MiB)", "ratio", "step (s)", "ratio"], rows))


if __name__ == "__main__":
    main()
