"""What benchmarks of the knowledge share: embeddings, seconds of a task, results as JSON."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from measuring import machine
from torch import Tensor
from torch.nn.functional import normalize

from ask_lightning.utilities.text_tables import markdown_table

T = TypeVar("T")
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"

# Groups of clips, directions in which those of a group differ, and how much each part counts.
_GROUPS, _RANK = 2000, 64
_GROUP_SHARE, _WITHIN_SHARE, _NOISE_SHARE = 0.8, 0.25, 0.3
_BLOCK = 100_000


def embedding_blocks(rows: int, width: int, seed: int, block: int = _BLOCK) -> Iterator[Tensor]:
    """Unit vectors that resemble embeddings, a block at a time.

    2,000 groups; within one, rows differ along 64 common directions of decaying strength (the i-th as 1/√i),
    and a little in all.

    Args:
        rows: Number of rows.
        width: Width of the embeddings.
        seed: Seed of the rows; groups and directions are the same for every seed.
        block: Number of rows at a time.

    Yields:
        `(block, width)` float32.
    """
    shared, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    groups = _GROUP_SHARE * normalize(torch.randn(_GROUPS, width, generator=shared), dim=1)
    basis = torch.linalg.qr(torch.randn(width, _RANK, generator=shared))[0].T
    basis *= _WITHIN_SHARE * torch.arange(1, len(basis) + 1).rsqrt()[:, None]
    noise = torch.randn(block, width, generator=own) * _NOISE_SHARE / width**0.5
    for first in range(0, rows, block):
        size = min(block, rows - first)
        group = torch.randint(_GROUPS, (size,), generator=own)
        mixed = torch.addmm(groups[group], torch.randn(size, len(basis), generator=own), basis)
        # The small part is drawn once, and each block takes its rows in another order.
        yield normalize(mixed + noise[torch.randperm(block, generator=own)[:size]], dim=1)


def embeddings(rows: int, width: int, seed: int) -> Tensor:
    """All blocks of `embedding_blocks` as one tensor `(rows, width)`."""
    whole = torch.empty(rows, width)
    for place, block in zip(whole.split(_BLOCK), embedding_blocks(rows, width, seed), strict=True):
        place.copy_(block)
    return whole


def timed(task: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a task that runs once, and what it returned."""
    started = time.perf_counter()
    result = task()
    return time.perf_counter() - started, result


def recall(found: Tensor, expected: Tensor) -> float:
    """Share of the expected rows `(B, K)` that are among the found ones."""
    return float((found[:, :, None] == expected[:, None]).any(dim=1).float().mean())


def peak_memory() -> float:
    """Largest memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def version_of_faiss() -> str | None:
    """Version of Faiss, if it is there."""
    try:
        import faiss
    except ImportError:
        return None
    return str(faiss.__version__)


def report(name: str, title: str, columns: list[str], rows: list[list[object]], settings: dict) -> None:
    """Print a table in Markdown, and keep it with what it was measured by in `docs/benchmarks/`."""
    print(f"\n{title}\n")
    print(markdown_table(columns, [list(map(str, row)) for row in rows]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": title,
        "settings": settings,
        "machine": machine() | {"faiss": version_of_faiss()},
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
