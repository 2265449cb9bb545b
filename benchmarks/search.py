"""Which search: time to build, time of a lookup, memory and recall of the true neighbours.

    python benchmarks/search.py --rows 100000 1000000 --threads 2

prints a Markdown table for each number of rows and keeps it in docs/benchmarks/. Queries are new rows of the
same distribution. "Again" is the time to build from what an index has learnt of earlier rows, as a refresh
does.
"""

import argparse
from functools import partial

import faiss
import torch
from measuring import medians
from stored_rows import embeddings, recall, report, timed

from ask_lightning.knowledge.exact_search import ExactSearch
from ask_lightning.knowledge.search import build_search


def indexes(rows: int, width: int) -> list[str]:
    """The kinds of search for so many rows."""
    lists = 1 << (int(rows**0.5).bit_length() - 1)
    kinds = ["exact", "auto", "Flat"]
    kinds += [f"IVF{lists},Flat;nprobe={max(1, lists // share)}" for share in (32, 16, 4)]
    kinds += [f"HNSW32;efSearch={reach}" for reach in (64, 256)]
    return [*kinds, f"IVF{lists},PQ{width // 4}x4fs", f"PQ{width // 4}x4fs", f"IVF{lists},SQfp16"]


def bytes_of(search) -> int:
    """What an index takes beyond the vectors."""
    index = getattr(search, "_index", None)
    return 0 if index is None else len(faiss.serialize_index(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000], help="numbers of rows")
    parser.add_argument("--width", type=int, default=512, help="d, width of the embeddings")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument("--queries", type=int, default=512, help="queries whose neighbours are compared")
    parser.add_argument("--repeats", type=int, default=11, help="lookups of which the median counts")
    parser.add_argument("--kinds", nargs="+", help="kinds of search; default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    for count in options.rows:
        rows, queries = embeddings(count, options.width, 0), embeddings(options.queries, options.width, 1)
        moved = embeddings(count, options.width, 2).mul_(0.1).add_(rows)
        moved /= torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        few = queries[:32]
        _, expected = ExactSearch(rows)(queries, 10)
        exact = build_search(rows, "exact")
        table = []
        for kind in options.kinds or indexes(count, options.width):
            built, search = timed(partial(build_search, rows, kind))
            again, learnt = None, getattr(search, "trained", None)
            milliseconds = medians(
                options.repeats, exact=partial(exact, few, 10), this=partial(search, few, 10)
            )
            found = recall(search(queries, 10)[1], expected)
            size = bytes_of(search)
            if learnt is not None:
                seconds, renewed = timed(partial(build_search, moved, kind, learnt))
                again = f"{seconds:.1f}{'' if renewed.trained is learnt else ' (learns again)'}"
            table.append(
                [
                    f"`{kind}`",
                    f"{built:.1f}",
                    again or "–",
                    f"{milliseconds['this']:.1f}",
                    f"{milliseconds['this'] / milliseconds['exact']:.2f}",
                    f"{size / 1e6:.0f}",
                    f"{found:.3f}",
                ]
            )
        columns = [
            "index",
            "build (s)",
            "again (s)",
            "search, B = 32 (ms)",
            "ratio to exact",
            "memory beside the rows (MB)",
            "recall@10",
        ]
        title = f"Search, N = {count:,}, d = {options.width}, one modality, {options.threads} threads"
        report(f"search-{count}", title, columns, table, vars(options))


if __name__ == "__main__":
    main()
