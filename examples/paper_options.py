"""Compare options of ASK on precomputed embeddings, where the paper leaves a choice (docs/paper.md).

    python examples/paper_options.py --audio audio.npy --text text.npy --pairs pairs.csv

The first row is ASK with its defaults. Each variant changes options of `ReliabilityOTLoss` or
`KnowledgeRefreshCallback`, and nothing else: `--variants "clustering=euclidean" "lambda_fine=0.1 T=2"`.
The arrays and the CSV are those of frozen_embeddings.py.
"""

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from ask_lightning import ASKModule, DriftMonitor, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.functional import nt_xent
from ask_lightning.reproduce import (
    Method,
    compare,
    comparison_markdown,
    differences_markdown,
    silence_lightning,
)
from ask_lightning.reproduce.tasks import embeddings_task
from ask_lightning.reproduce.tasks.embeddings import ProjectionHeads

VARIANTS = (
    "normalize_prototypes=false",
    "reliability_form=agreement_factor",
    "reliability_form=agreement_term",
    "reliability_form=disagreement_term",
    "clustering=euclidean",
    "distinct_clips=true",
    "num_coarse_neighbors=3",
    "plan_scaling=row",
    "plan_scaling=row a2t_realignment=transposed_result",
    "plan_scaling=row a2t_realignment=same_plan",
    "plan_scaling=row transport_solver=pot:sinkhorn_unbalanced;reg_m=1.0",
)


class TrainedHeads(ProjectionHeads):
    """The heads with a training step of their own, which `ASKModule` runs and whose loss it replaces."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        similarity = self.encode_text(batch) @ self.encode_audio(batch).T
        return (nt_xent(similarity) + nt_xent(similarity.T)) / 2


def main() -> None:
    """Train each variant with each seed and print the tables."""
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
    settings = ({"temperature": options.temperature},)
    methods = [Method(name, settings, partial(build, name, options)) for name in ("ASK", *options.variants)]
    compared = compare(methods, task.protocol(), options.output, seeds=range(options.seeds))
    tables = [comparison_markdown(compared)]
    if options.seeds > 1:
        tables.append(differences_markdown(compared, "ASK"))
    print("\nTest recall in %; epoch and calibration chosen on validation:\n\n" + "\n\n".join(tables))
    print(f"\n{options.output}/runs.csv has every run; {time.perf_counter() - started:.0f} s in all.")


def build(
    name: str, options: argparse.Namespace, settings: Mapping[str, Any]
) -> tuple[L.LightningModule, list[L.Callback]]:
    """The heads in an `ASKModule` with the options that the name of a variant consists of."""
    of_loss: dict[str, Any] = dict(settings)
    of_refresh: dict[str, Any] = {"T": options.T, "num_prototypes": options.prototypes}
    for option in () if name == "ASK" else name.split():
        argument, _, value = option.partition("=")
        arguments = of_loss if argument in signature(ReliabilityOTLoss).parameters else of_refresh
        arguments[argument] = number_or_text(value)
    loss = ReliabilityOTLoss(**of_loss)
    widths = (np.load(path, mmap_mode="r").shape[1] for path in (options.audio, options.text))
    heads = TrainedHeads(*widths, options.width, options.learning_rate)
    module = ASKModule(heads, loss, ids="clip_id", caption_ids="caption_id")
    return module, [KnowledgeRefreshCallback(**of_refresh), DriftMonitor()]


def number_or_text(value: str) -> Any:
    """What JSON reads: a number, `true`, `false`, `null`, a list; else the text itself."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


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
    add("--variants", nargs="*", default=VARIANTS, metavar="OPTIONS", help="options to change, as name=value")
    add("--temperature", type=float, default=0.07, help="temperature of all variants")
    add("--width", type=int, default=256, help="width of the shared embedding space")
    add("--epochs", type=int, default=8, help="epochs of each run")
    add("--T", type=int, default=4, help="epochs between refreshes of the knowledge")
    add("--prototypes", type=int, default=64, help="number of coarse prototypes")
    add("--seeds", type=int, default=3, help="runs of each variant")
    add("--batch-size", type=int, default=32, help="pairs in a batch")
    add("--learning-rate", type=float, default=1e-3, help="learning rate of all variants")
    add("--output", type=Path, default=Path("runs/paper_options"), help="where logs and checkpoints go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
