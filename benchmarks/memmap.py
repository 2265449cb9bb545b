"""Knowledge larger than memory: building and searching a base in files (`storage="memmap"`).

    python benchmarks/memmap.py --pairs 1000000 --threads 2

writes generated embeddings into a directory as a refresh does, builds the base and looks batches up. The
table has times, the largest memory of the process, the recall of the true neighbours and the time of a
refresh that uses what the indexes have learnt again. The files are removed at the end.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from measuring import medians
from stored_rows import embedding_blocks, embeddings, peak_memory, recall, report, timed

from ask_lightning import KnowledgeBase
from ask_lightning.knowledge.base_settings import BaseSettings
from ask_lightning.knowledge.exact_search import ExactSearch
from ask_lightning.knowledge.row_files import PairFiles, PairWriter


def write(options: argparse.Namespace, directory: Path, seed: int) -> PairFiles:
    writer = PairWriter(directory, options.pairs)
    sides = (embedding_blocks(options.pairs, options.width, seed + side) for side in (0, 1))
    for audio, text in zip(*sides, strict=True):
        writer.append(audio, text)
    return writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="N, pairs in the knowledge base")
    parser.add_argument("--width", type=int, default=512, help="d, width of the embeddings")
    parser.add_argument("--prototypes", type=int, default=512, help="M, coarse prototypes")
    parser.add_argument("--index", default="auto", help="kind of search")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument("--queries", type=int, default=256, help="queries whose neighbours are compared")
    parser.add_argument("--repeats", type=int, default=15, help="lookups of which the median counts")
    parser.add_argument("--directory", help="directory for the files; default: a temporary one")
    parser.add_argument("--no-refresh", action="store_true", help="leave out the second build")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import faiss

    faiss.omp_set_num_threads(options.threads)
    without_prototypes = BaseSettings(num_prototypes=0, index=options.index)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        directory = Path(folder)
        written, files = timed(lambda: write(options, directory, 0))
        without, base = timed(lambda: KnowledgeBase.from_files(files, directory, without_prototypes))
        prototypes = 0.0
        if options.prototypes:
            prototypes, _ = timed(
                lambda: KnowledgeBase.from_files(
                    files, directory, BaseSettings(options.prototypes, index="exact")
                )
            )
        kind = base.fine.search_audio.kind
        memory = peak_memory()
        queries = [embeddings(options.queries, options.width, seed) for seed in (10, 11)]
        _, expected = ExactSearch(files.audio.mapped)(queries[0], 10)
        found = base.lookup(*queries, 10, granularities=("fine",))["fine"].audio_rows
        few = [side[:32] for side in queries]
        lookup = partial(base.lookup, *few, 10, granularities=("fine",))
        milliseconds = medians(options.repeats, lookup=lookup)["lookup"]
        row = [
            f"{options.pairs:,}",
            kind,
            f"{4 * options.pairs * options.width / 1e9:.1f}",
            f"{written:.0f}",
            f"{without:.0f}",
            f"{prototypes:.0f}",
            f"{memory:.1f}",
            f"{milliseconds:.0f}",
            f"{recall(found, expected):.3f}",
        ]
        if not options.no_refresh:
            renewed = write(options, directory, 2)
            again, _ = timed(
                lambda: KnowledgeBase.from_files(renewed, directory, without_prototypes, previous=base)
            )
            row.append(f"{again:.0f}")
        else:
            row.append("–")
    columns = [
        "N",
        "index",
        "files (GB)",
        "writing (s)",
        "indexes (s)",
        "prototypes (s)",
        "peak memory (GiB)",
        "lookup (ms)",
        "recall@10",
        "indexes again (s)",
    ]
    title = f"Knowledge in files, d = {options.width}, B = 32, {options.threads} threads"
    settings = {name: value for name, value in vars(options).items() if name != "directory"}
    report(f"memmap-{options.pairs}", title, columns, [row], settings)


if __name__ == "__main__":
    main()
