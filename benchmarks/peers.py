"""What a step costs beside the memories and caches of other libraries, at the same sizes.

    pip install --no-deps pytorch-metric-learning lightly lightly-utils sentence-transformers torchvision
    python benchmarks/peers.py --json docs/benchmarks/peers.json

prints two Markdown tables. Steps of all libraries are timed in turn in one process; a time is the median over
rounds, a ratio that of the two medians. The memory is what a process of its own takes at most for a full
memory and a step with it, from /proc (Linux). What is compared is the loss with its memory, forwards and
backwards, with the same number of remembered pairs; only the second table has encoders. Libraries differ in
what their loss is, which the column "differs" says.
"""

import argparse
import json
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measuring import machine, medians
from torch import Tensor, nn
from torch.nn.functional import normalize

from ask_lightning import ASKModule, KnowledgeBase, KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss
from ask_lightning.losses import CrossBatchMemoryLoss, MomentumContrastLoss, NearestNeighborContrastiveLoss
from ask_lightning.utilities.text_tables import markdown_table

Step = Callable[[], Tensor]
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Sizes:
    """B pairs in a batch, N remembered pairs, embeddings of width d."""

    batch: int
    pairs: int
    width: int


class Batches:
    """Batches of random unit embeddings whose clip ids walk through N clips."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.generator = torch.Generator().manual_seed(0)
        self._first = 0

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Audio and text `(B, d)`, which want a gradient, and ids `(B,)`."""
        shape = (2, self.sizes.batch, self.sizes.width)
        audio, text = normalize(torch.randn(shape, generator=self.generator), dim=2)
        ids = (torch.arange(self.sizes.batch) + self._first) % self.sizes.pairs
        self._first += self.sizes.batch
        return audio.requires_grad_(), text.requires_grad_(), ids


def filled(step: Step, sizes: Sizes) -> Step:
    """The step after as many batches as fill its memory."""
    for _ in range(-(-sizes.pairs // sizes.batch) + 1):
        step()
    return step


def nt_xent(sizes: Sizes) -> Step:
    loss, batches = NTXentLoss(TEMPERATURE), Batches(sizes)

    def step() -> Tensor:
        audio, text, ids = batches.draw()
        return loss(audio, text, ids=ids)

    return step


def cross_batch_memory(sizes: Sizes) -> Step:
    loss, batches = CrossBatchMemoryLoss(TEMPERATURE, sizes.pairs, start_step=0), Batches(sizes)

    def step() -> Tensor:
        audio, text, ids = batches.draw()
        return loss(audio, text, ids=ids)

    return filled(step, sizes)


def metric_learning_memory(sizes: Sizes) -> Step:
    from pytorch_metric_learning import losses

    memory = losses.CrossBatchMemory(
        losses.NTXentLoss(temperature=TEMPERATURE), sizes.width, memory_size=2 * sizes.pairs
    )
    batches = Batches(sizes)
    # Filled by hand: its steps are too slow to fill it.
    rows = torch.randn(2 * sizes.pairs, sizes.width, generator=batches.generator)
    memory.embedding_memory = normalize(rows, dim=1)
    memory.label_memory = torch.arange(sizes.pairs).repeat(2)
    memory.has_been_filled = True

    def step() -> Tensor:
        audio, text, ids = batches.draw()
        return memory(torch.cat([audio, text]), torch.cat([ids, ids]))

    return step


def momentum_contrast(sizes: Sizes) -> Step:
    loss, batches = MomentumContrastLoss(TEMPERATURE, sizes.pairs), Batches(sizes)
    copied = nn.Identity()

    def step() -> Tensor:
        audio, text, ids = batches.draw()
        loss.make_keys(copied, lambda _: (audio.detach(), text.detach()), step=0)
        return loss(audio, text, ids=ids)

    return filled(step, sizes)


def lightly_memory(sizes: Sizes) -> Step:
    from lightly.loss import NTXentLoss

    batches = Batches(sizes)
    directions = [NTXentLoss(TEMPERATURE, memory_bank_size=(sizes.pairs, sizes.width)) for _ in range(2)]

    def step() -> Tensor:
        audio, text, _ = batches.draw()
        return 0.5 * (directions[0](audio, text.detach()) + directions[1](text, audio.detach()))

    return filled(step, sizes)


def nearest_neighbors(sizes: Sizes) -> Step:
    loss, batches = NearestNeighborContrastiveLoss(TEMPERATURE, sizes.pairs), Batches(sizes)

    def step() -> Tensor:
        audio, text, ids = batches.draw()
        return loss(audio, text, ids=ids)

    return filled(step, sizes)


def lightly_nearest_neighbors(sizes: Sizes) -> Step:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNMemoryBankModule

    support, loss = NNMemoryBankModule(size=(sizes.pairs, sizes.width)), NTXentLoss(TEMPERATURE)
    batches = Batches(sizes)

    def step() -> Tensor:
        audio, text, _ = batches.draw()
        return loss(audio, support(text.detach(), update=True))

    return filled(step, sizes)


def teacher(sizes: Sizes) -> Step:
    return with_knowledge(sizes, KnowledgeDistillationLoss(temperature=TEMPERATURE))


def ask(sizes: Sizes) -> Step:
    return with_knowledge(sizes, ReliabilityOTLoss(temperature=TEMPERATURE))


def with_knowledge(sizes: Sizes, loss: nn.Module) -> Step:
    batches = Batches(sizes)
    stored = normalize(torch.randn(2, sizes.pairs, sizes.width, generator=batches.generator), dim=2)
    loss.knowledge = KnowledgeBase.from_embeddings(
        *stored, ids=torch.arange(sizes.pairs), num_prototypes=min(512, sizes.pairs)
    )

    def step() -> Tensor:
        audio, text, ids = batches.draw()
        return loss(audio, text, ids=ids)

    return step


@dataclass(frozen=True)
class Contestant:
    """One row: the loss, whose it is, what makes it, and what it does otherwise than ours."""

    what: str
    library: str
    make: Callable[[Sizes], Step]
    differs: str = ""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.what}, {self.library}"


MEMORIES = (
    Contestant("no memory", "ours", nt_xent),
    Contestant("cross-batch memory", "ours", cross_batch_memory, "two modalities, own clip left out"),
    Contestant(
        "cross-batch memory",
        "pytorch-metric-learning",
        metric_learning_memory,
        "one memory of both modalities, all pairs of rows",
    ),
    Contestant("momentum contrast", "ours", momentum_contrast, "own clip left out, keys of the batch too"),
    Contestant("memory bank", "lightly", lightly_memory, "own clip is a negative"),
    Contestant("nearest neighbours", "ours", nearest_neighbors, "both directions, own clip left out"),
    Contestant(
        "nearest neighbours",
        "lightly",
        lightly_nearest_neighbors,
        "one view, own clip is a negative",
    ),
    Contestant("teacher", "ours", teacher),
    Contestant("ASK", "ours", ask),
)


def median_times(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, forwards and backwards."""
    return medians(rounds, **{name: lambda step=step: step().backward() for name, step in steps.items()})


def mebibytes_beyond(step: Callable[[], object]) -> float:
    """By how much the memory of this process rises at most while something runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1])


def memory_of(threads: int, make: Callable[..., Step], sizes: Sizes) -> float:
    """MiB that a full memory and a step take at most."""
    torch.set_num_threads(threads)
    quiet()
    make(Sizes(sizes.batch, sizes.batch, sizes.width))().backward()  # what libraries allocate once
    return mebibytes_beyond(lambda: make(sizes)().backward())


def in_process(function: Callable[..., float], *arguments: Any) -> float:
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def compare_memories(sizes: Sizes, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of every loss at one size."""
    steps = {contestant.name: contestant.make(sizes) for contestant in MEMORIES}
    took = median_times(steps, options.rounds)
    plain = took[MEMORIES[0].name]
    return [
        {
            "what": contestant.what,
            "library": contestant.library,
            "step (ms)": took[contestant.name],
            "times NT-Xent": took[contestant.name] / plain,
            "memory (MiB)": in_process(memory_of, options.threads, contestant.make, sizes),
            "differs": contestant.differs,
        }
        for contestant in MEMORIES
    ]


class Encoder(nn.Module):
    """A small transformer over tokens whose mean is the embedding, as both libraries want it."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Add the embeddings `(B, d)` under the name of sentence-transformers."""
        return features | {"sentence_embedding": self.layers(self.tokens(features["input_ids"])).mean(dim=1)}


class Pairs(pl.LightningModule):
    """The encoder for both sides of a pair."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def encode_audio(self, batch: dict[str, Tensor]) -> Tensor:
        """Embed the first side, `(B, d)`."""
        embeddings: Tensor = self.encoder({"input_ids": batch["audio"]})["sentence_embedding"]
        return embeddings

    def encode_text(self, batch: dict[str, Tensor]) -> Tensor:
        """Embed the second side, `(B, d)`."""
        embeddings: Tensor = self.encoder({"input_ids": batch["text"]})["sentence_embedding"]
        return embeddings


def chunked(options: argparse.Namespace, batch: int) -> Step:
    torch.manual_seed(0)
    model = Pairs(Encoder(options.encoder_width, options.layers))
    module = ASKModule(model, NTXentLoss(0.05), step="encode", chunk_size=options.chunk)
    module.trainer = pl.Trainer(logger=False, barebones=True, accelerator="cpu")
    tokens = torch.randint(1000, (2, batch, options.tokens))
    return lambda: module.training_step({"audio": tokens[0], "text": tokens[1]})


def sentence_transformers_cached(options: argparse.Namespace, batch: int) -> Step:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesSymmetricRankingLoss,
    )

    torch.manual_seed(0)
    model = SentenceTransformer(
        modules=[Encoder(options.encoder_width, options.layers)], device="cpu", similarity_fn_name="cosine"
    )
    loss = CachedMultipleNegativesSymmetricRankingLoss(model, scale=20.0, mini_batch_size=options.chunk)
    sides = [{"input_ids": side} for side in torch.randint(1000, (2, batch, options.tokens))]
    return lambda: loss(sides, torch.arange(batch))


CACHES = {"ours": chunked, "sentence-transformers": sentence_transformers_cached}


def memory_of_cache(library: str, options: argparse.Namespace) -> float:
    """MiB that a step in chunks takes at most."""
    torch.set_num_threads(options.threads)
    quiet()
    CACHES[library](options, 2)().backward()
    step = CACHES[library](options, options.cached_batch)
    return mebibytes_beyond(lambda: step().backward())


def compare_caches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time, memory and value of a large batch in chunks."""
    steps = {library: make(options, options.cached_batch) for library, make in CACHES.items()}
    values = {library: float(step().detach()) for library, step in steps.items()}
    took = median_times(steps, max(3, options.rounds // 10))
    return [
        {
            "library": library,
            "step (s)": took[library] / 1e3,
            "ratio": took[library] / took["ours"],
            "memory (MiB)": in_process(memory_of_cache, library, options),
            "loss": values[library],
        }
        for library in CACHES
    ]


def quiet() -> None:
    import logging

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    return markdown_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="B, pairs in a batch")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1024, 8192], help="N, remembered pairs")
    parser.add_argument("--width", type=int, default=512, help="d, width of embeddings")
    parser.add_argument("--cached-batch", type=int, default=256, help="pairs in a batch that goes in chunks")
    parser.add_argument("--chunk", type=int, default=32, help="pairs in a chunk")
    parser.add_argument("--encoder-width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each side of a pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of which the median counts")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet()

    libraries = ("pytorch-metric-learning", "lightly", "sentence-transformers")
    written: dict[str, Any] = {
        "machine": machine() | {name: version(name) for name in libraries},
        "memories": {},
    }
    print(written["machine"])
    for pairs in options.pairs:
        rows = compare_memories(Sizes(options.batch, pairs, options.width), options)
        written["memories"][str(pairs)] = rows
        print(f"\nB = {options.batch}, N = {pairs:,}, d = {options.width}\n\n{table(rows)}")
    written["caches"] = compare_caches(options)
    print(
        f"\nA batch of {options.cached_batch} in chunks of {options.chunk}, one transformer of "
        f"{options.layers} layers and width {options.encoder_width}\n\n{table(written['caches'])}"
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
