"""Prototypes: the time of K-means and pairing, and what fitting on samples costs in the objective.

    python benchmarks/prototypes.py --pairs 400000 --width 1024 --threads 2

The objective of spherical K-means is the mean cosine between a row and the centroid of its cluster. "All
rows" is Lloyd's iteration over all rows, which is what smaller sources get.
"""

import argparse

import torch
from stored_rows import embeddings, report, timed

from ask_lightning.knowledge import kmeans
from ask_lightning.knowledge.pairs import StoredPairs
from ask_lightning.knowledge.prototypes import build_prototypes
from ask_lightning.knowledge.row_shard import ShardedRows


def objective(rows: torch.Tensor, assignment: torch.Tensor, clusters: int) -> float:
    sums = torch.zeros(clusters, rows.shape[1]).index_add_(0, assignment, rows)
    return float(sums.norm(dim=1).sum() / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400_000, help="N, pairs in the knowledge base")
    parser.add_argument("--width", type=int, default=1024, help="d, width of the embeddings")
    parser.add_argument("--prototypes", type=int, default=512, help="M, coarse prototypes")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument("--all-rows", action="store_true", help="also fit on all rows, which takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    audio, text = (embeddings(options.pairs, options.width, seed) for seed in (0, 1))
    table = []
    for name in ("samples", "all rows") if options.all_rows else ("samples",):
        if name == "all rows":
            kmeans._ROWS_FITTED_WHOLE = options.pairs
        seconds, _ = timed(lambda: build_prototypes(StoredPairs(audio, text), options.prototypes))
        assignment = kmeans.kmeans(ShardedRows.unsharded(audio), options.prototypes)
        table.append([name, f"{seconds:.0f}", f"{objective(audio, assignment, options.prototypes):.4f}"])
    title = (
        f"Prototypes, N = {options.pairs:,}, d = {options.width}, M = {options.prototypes}, both modalities "
        f"and pairing, {options.threads} threads"
    )
    report("prototypes", title, ["centroids fitted on", "time (s)", "objective"], table, vars(options))


if __name__ == "__main__":
    main()
