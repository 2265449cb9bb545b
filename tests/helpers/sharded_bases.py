"""Knowledge bases of which every process has its share."""

import torch
from torch import Tensor

from ask_lightning import KnowledgeBase
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.distributed import Ranks

WIDTH = 16


def directions(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def source(rows: int, captions: int = 1) -> tuple[Tensor, Tensor, list[str]]:
    """Pairs of which `captions` at a time share a clip and its audio, so that scores tie."""
    clip = torch.arange(rows) // captions
    audio = directions(rows, WIDTH, 0)[clip]
    return audio, directions(rows, WIDTH, 1), [f"{number}.wav" for number in clip.tolist()]


def shard_of(rows: int, kind: str) -> RowShard:
    ranks = Ranks.current()
    if kind == "interleaved":
        return RowShard.interleaved(rows, ranks)
    if kind == "five at a time":
        return RowShard.interleaved(rows // 5, ranks, 5)
    counts = [rows // ranks.size] * ranks.size
    counts[0] += 3
    counts[-1] = rows - sum(counts[:-1])
    return RowShard.contiguous(counts, ranks)


def build(rows: int, kind: str, **options) -> KnowledgeBase:
    audio, text, ids = source(rows, captions=5 if kind == "five at a time" else 1)
    shard = shard_of(rows, kind)
    own = shard.global_rows()
    return KnowledgeBase.from_embeddings(
        audio[own],
        text[own],
        ids=[ids[row] for row in own.tolist()],
        shard=shard,
        **{"num_prototypes": min(8, rows), **options},
    )
