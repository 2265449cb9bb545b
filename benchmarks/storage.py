"""What half-precision storage and sharding do to a knowledge base: memory, recall of neighbours, time.

    python benchmarks/storage.py

prints two Markdown tables and keeps them in docs/benchmarks/. Storages take turns; times are medians.
"""

import argparse
import os
import socket
import statistics

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import medians
from stored_rows import embeddings, recall, report, timed

from ask_lightning import KnowledgeBase
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.distributed import Ranks


def storage_table(options: argparse.Namespace) -> None:
    audio, text = (embeddings(options.pairs, options.width, seed) for seed in (0, 1))
    queries = [embeddings(options.queries, options.width, seed) for seed in (2, 3)]
    few = [side[:32] for side in queries]
    bases = {
        storage: KnowledgeBase.from_embeddings(audio, text, num_prototypes=0, index="exact", storage=storage)
        for storage in ("float32", "float16", "bfloat16")
    }
    found = {
        storage: base.lookup(*queries, 10, granularities=("fine",))["fine"].audio_rows
        for storage, base in bases.items()
    }
    lookups = {
        storage: lambda base=base: base.lookup(*few, 10, granularities=("fine",))
        for storage, base in bases.items()
    }
    milliseconds = medians(options.repeats, **lookups)
    columns = [
        "storage",
        "memory (MB)",
        "neighbours of float32 found",
        "first neighbour the same",
        "lookup (ms)",
        "ratio",
    ]
    rows = [
        [
            storage,
            f"{base.num_bytes / 1e6:.1f}",
            f"{recall(found[storage], found['float32']):.4f}",
            f"{(found[storage][:, 0] == found['float32'][:, 0]).float().mean():.4f}",
            f"{milliseconds[storage]:.0f}",
            f"{milliseconds[storage] / milliseconds['float32']:.2f}",
        ]
        for storage, base in bases.items()
    ]
    title = (
        f"Storage, N = {options.pairs:,}, d = {options.width}, exact search, K = 10, B = 32, "
        f"{torch.get_num_threads()} thread"
    )
    report("storage", title, columns, rows, vars(options))


def work(rank: int, size: int, port: int, placement: str, options: argparse.Namespace, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    shard = RowShard.interleaved(options.pairs, Ranks.current())
    sides = [embeddings(options.pairs, options.width, seed)[shard.global_rows()] for seed in (0, 1)]
    base = KnowledgeBase.from_embeddings(*sides, num_prototypes=64, placement=placement, shard=shard)
    few = [embeddings(32, options.width, 2 + rank) for _ in range(2)]
    base.lookup(*few, 10)
    # By the clock, and as often on every rank: what a rank waits for the others counts.
    seconds = [timed(lambda: base.lookup(*few, 10))[0] for _ in range(options.repeats)]
    if rank == 0:
        results.put((base.num_bytes / 1e6, 1e3 * statistics.median(seconds)))
    dist.barrier()
    dist.destroy_process_group()


def placement_table(options: argparse.Namespace) -> None:
    rows = []
    for size in options.ranks:
        for placement in ("replicated", "sharded"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            results = mp.get_context("spawn").SimpleQueue()
            mp.spawn(work, (size, port, placement, options, results), nprocs=size)
            memory, milliseconds = results.get()
            rows.append([size, placement, f"{memory:.1f}", f"{milliseconds:.0f}"])
    title = f"Placement, N = {options.pairs:,}, d = {options.width}, M = 64, B = 32 a rank, one thread a rank"
    report(
        "placement",
        title,
        ["ranks", "placement", "memory of each rank (MB)", "lookup (ms)"],
        rows,
        vars(options),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40_000, help="N, pairs in the knowledge base")
    parser.add_argument("--width", type=int, default=512, help="d, width of the embeddings")
    parser.add_argument("--queries", type=int, default=256, help="queries whose neighbours are compared")
    parser.add_argument("--repeats", type=int, default=11, help="lookups of which the median counts")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="numbers of ranks")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    storage_table(options)
    if options.ranks:
        placement_table(options)


if __name__ == "__main__":
    main()
