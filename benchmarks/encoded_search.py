"""What `ask-lightning search` costs over millions of clips: time, memory and recall of each index.

    python benchmarks/encoded_search.py --clips 1000000 --width 512

writes a file of generated clips (2 GiB in float32, and a caption for every tenth clip) into a folder that
is removed at the end, searches it by each index and prints a Markdown table. Every index is measured in a
process of its own. Times are those of processors, so that other work on the machine counts little: with
OMP_NUM_THREADS=1 they are what one waits on an idle machine once the file is in memory.

Clips and captions share hidden causes in a few thousand groups of very different size, of a dimension far
below the width, as sounds and their descriptions do; a constant offset keeps the two sides apart.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ask_lightning.cli.encoded_pairs import EncodedPairs
from ask_lightning.cli.row_search import best_rows
from ask_lightning.cli.search_index import choose_index
from ask_lightning.cli.stored_texts import StoredTexts
from ask_lightning.metrics import Calibration, HubCalibration, QueryBank
from ask_lightning.models import TinyRetriever
from ask_lightning.utilities.text_tables import markdown_table
from ask_lightning.utilities.weights import weights_fingerprint

_GROUPS, _CAUSES, _BLOCK, _BANK, _QUERIES, _TOP = 5000, 48, 100_000, 2000, 200, 10
_CLIPS_PER_CAPTION = 10


class Pairs:
    """A source of clips and captions as unit vectors."""

    def __init__(self, width: int) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.centers = self.draw(_GROUPS, _CAUSES)
        self.mixing = self.draw(_CAUSES, width) / _CAUSES**0.5
        self.offsets = 0.5 * self.draw(2, width)
        self.shares = 1 / torch.arange(1, _GROUPS + 1)

    def draw(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(*shape, generator=self.generator)

    def make(self, count: int) -> tuple[Tensor, Tensor]:
        """Clips and captions `(count, d)`."""
        group = torch.multinomial(self.shares, count, replacement=True, generator=self.generator)
        cause = self.centers[group] + 0.6 * self.draw(count, _CAUSES)
        audio, text = (
            normalize((cause + 0.3 * self.draw(count, _CAUSES)) @ self.mixing + offset, dim=1)
            for offset in self.offsets
        )
        return audio, text


def write_clips(folder: Path, options: argparse.Namespace) -> None:
    """Write the encoded file, the queries, and the model that is said to have encoded it."""
    model = TinyRetriever(width=options.width)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.strategy.connect(model)
    checkpoint = folder / "model.ckpt"
    trainer.save_checkpoint(checkpoint)
    source, dtype = Pairs(options.width), getattr(torch, options.dtype)
    audio = torch.empty(options.clips, options.width, dtype=dtype)
    texts = []
    for block in audio.split(_BLOCK):
        made, described = source.make(len(block))
        block.copy_(made)
        texts.append(described[::_CLIPS_PER_CAPTION].to(dtype))
    bank = QueryBank(*source.make(_BANK))
    kind = Calibration("nearest_neighbors")
    biases = [
        HubCalibration.from_bank(bank, block.float(), block[:1].float(), kind).audio_bias
        for block in audio.split(_BLOCK)
    ]
    described = range(0, options.clips, _CLIPS_PER_CAPTION)
    pairs = EncodedPairs(
        audio=audio,
        text=torch.cat(texts),
        clip_ids=torch.arange(options.clips),
        clip_of=torch.tensor(described),
        names=StoredTexts.of(f"file:folder/sound-{number:08d}.wav" for number in range(options.clips)),
        captions=StoredTexts.of(f"sound number {number} of a generated collection" for number in described),
        files=StoredTexts.of(f"folder/sound-{number:08d}.wav" for number in range(options.clips)),
        model={
            "class_path": "ask_lightning.models.TinyRetriever",
            "checkpoint": str(checkpoint),
            "fingerprint": weights_fingerprint(model),
        },
        sample_rate=16000,
        calibration=HubCalibration(kind, torch.cat(biases).float(), torch.zeros(len(described))),
    )
    pairs.save(folder / "clips.safetensors")
    torch.save(source.make(_QUERIES)[1], folder / "queries.pt")


def measure(folder: Path, index: str, calibrated: bool) -> None:
    """Search by one index, and print what it took as JSON; the process does nothing else."""
    path = folder / "clips.safetensors"
    pairs = EncodedPairs.load(path)
    if not calibrated:
        pairs.calibration = None
    queries = torch.load(folder / "queries.pt")
    chosen = choose_index(path, pairs, "audio", index)
    best_rows(pairs, "audio", queries[0], _TOP, index=chosen.search)
    started = time.process_time()
    found = [best_rows(pairs, "audio", query, _TOP, index=chosen.search).rows.tolist() for query in queries]
    milliseconds = 1e3 * (time.process_time() - started) / len(queries)
    print(json.dumps({"milliseconds": milliseconds, "found": found, **_memory()}))


def _memory() -> dict[str, float]:
    """Peak of what this process holds in memory and what of it at the end is no mapped file, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    held = {name: int(value) / 1024 for name, value in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return {"peak": held["VmHWM"], "own": held["RssAnon"]}


def run(*arguments: object) -> tuple[str, float]:
    """Standard output of a process, and the seconds of processors that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000, help="N, clips and captions")
    parser.add_argument("--width", type=int, default=512, help="d, width of the embeddings")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--index", nargs="+", default=["exact", "ivf", "hnsw"], help="what to measure")
    parser.add_argument("--folder", type=Path, help="folder for the files (default: one of the system)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.folder, options.measure[0], options.measure[1] == "calibrated")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_clips(folder, options)
        path = folder / "clips.safetensors"
        gib = path.stat().st_size / 2**30
        made = f"{options.clips:,} clips, d = {options.width}, {options.dtype}, {gib:.1f} GiB"
        print(f"\n{made}, {torch.get_num_threads()} threads\n")
        rows, expected = [], {}
        for index in options.index:
            query = ("-m", "ask_lightning", "search", path, "--text", "rain", "--json", "--index", index)
            first = run(*query)[1]
            whole = min(run(*query)[1] for _ in range(2))
            kept = sum(file.stat().st_size for file in folder.glob("*.faiss") if index_of(file) == index)
            once = [f"{first - whole:.0f}", f"{kept / 2**20:.0f}"] if kept else ["", ""]
            cells = [index, *once, f"{whole:.1f}"]
            for kind in ("raw", "calibrated"):
                measured = json.loads(run(__file__, "--folder", folder, "--measure", index, kind)[0])
                exact = expected.setdefault(kind, measured["found"])
                hits = [len(set(one) & set(two)) for one, two in zip(measured["found"], exact, strict=True)]
                cells += [f"{measured['milliseconds']:.1f}", f"{sum(hits) / _TOP / len(hits):.3f}"]
            rows.append([*cells, f"{measured['peak']:.0f}", f"{measured['own']:.0f}"])
            print(rows[-1], file=sys.stderr, flush=True)
        columns = ["index", "built once (s)", "its file (MiB)", "command (s)", "query (ms)", f"recall@{_TOP}"]
        columns += ["calibrated query (ms)", f"recall@{_TOP}", "peak memory (MiB)", "of it own (MiB)"]
        print(markdown_table(columns, rows))


def index_of(file: Path) -> str:
    """The index that a file holds; its name is that of the index as far as signs allow."""
    return file.name.split(".")[-2]


if __name__ == "__main__":
    main()
