"""What half-precision storage and sharding do to a knowledge base: memory, recall of neighbours, time.

    python benchmarks/storage.py

prints two Markdown tables. The embeddings are clustered unit vectors, as those of captions and clips are.
"""

import argparse
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from ask_lightning import KnowledgeBase
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.text_tables import markdown_table


def embeddings(pairs: int, width: int, seed: int) -> Tensor:
    """Unit vectors in a few hundred groups; cosines within a group lie around 0.8."""
    generator = torch.Generator().manual_seed(seed)
    centers = normalize(torch.randn(300, width, generator=generator), dim=1)
    noise = normalize(torch.randn(pairs, width, generator=generator), dim=1)
    group = torch.randint(300, (pairs,), generator=generator)
    return normalize(2 * centers[group] + noise, dim=1)


def fastest(rounds: int, task) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        task()
        best = min(best, time.perf_counter() - started)
    return 1e3 * best


def storage_table(options: argparse.Namespace) -> None:
    audio, text = (embeddings(options.pairs, options.width, seed) for seed in (0, 1))
    queries = [normalize(side[:256] + 0.3 * torch.randn(256, options.width), dim=1) for side in (audio, text)]
    print(f"\nStorage, N = {options.pairs:,}, d = {options.width}, exact search, K = 10, B = 32\n")
    columns = [
        "storage",
        "memory (MB)",
        "neighbours of float32 found",
        "first neighbour the same",
        "lookup (ms)",
    ]
    rows = []
    expected = None
    for storage in ("float32", "float16", "bfloat16"):
        base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=1, index="exact", storage=storage)
        found = base.lookup(*queries, 10)["fine"].audio_rows
        expected = found if expected is None else expected
        hits = (found[:, :, None] == expected[:, None]).any(dim=2).float().mean()
        first = (found[:, 0] == expected[:, 0]).float().mean()
        few = [side[:32] for side in queries]
        milliseconds = fastest(5, lambda base=base, few=few: base.lookup(*few, 10, granularities=("fine",)))
        memory = f"{base.num_bytes / 1e6:.1f}"
        rows.append([storage, memory, f"{hits:.4f}", f"{first:.4f}", f"{milliseconds:.0f}"])
    print(markdown_table(columns, rows))


def work(rank: int, size: int, port: int, placement: str, options: argparse.Namespace, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    shard = RowShard.interleaved(options.pairs, Ranks.current())
    sides = [embeddings(options.pairs, options.width, seed)[shard.global_rows()] for seed in (0, 1)]
    base = KnowledgeBase.from_embeddings(*sides, num_prototypes=64, placement=placement, shard=shard)
    few = [embeddings(32, options.width, 2 + rank) for _ in range(2)]
    milliseconds = fastest(5, lambda: base.lookup(*few, 10))
    if rank == 0:
        results.put((base.num_bytes / 1e6, milliseconds))
    dist.barrier()
    dist.destroy_process_group()


def placement_table(options: argparse.Namespace) -> None:
    print(
        f"\nPlacement, N = {options.pairs:,}, d = {options.width}, M = 64, B = 32 a rank, one thread a rank\n"
    )
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
    print(markdown_table(["ranks", "placement", "memory of each rank (MB)", "lookup (ms)"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40_000, help="N, pairs in the knowledge base")
    parser.add_argument("--width", type=int, default=512, help="d, width of the embeddings")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    storage_table(options)
    placement_table(options)


if __name__ == "__main__":
    main()
