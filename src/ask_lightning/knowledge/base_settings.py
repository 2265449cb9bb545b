"""How a knowledge base is built, and what cannot be combined. Axes: `N` pairs, `n` pairs of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args
from warnings import warn

from torch import Tensor

from ask_lightning.knowledge.kmeans import CLUSTERINGS, Clustering
from ask_lightning.knowledge.prototypes import PAIRINGS, PrototypePairing
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.arguments import check_choice, check_count
from ask_lightning.utilities.clip_ids import integer_ids

Placement = Literal["replicated", "sharded"]
Storage = Literal["float32", "float16", "bfloat16", "memmap"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)
STORAGES: tuple[str, ...] = get_args(Storage)


@dataclass(frozen=True)
class BaseSettings:
    """How a base is built, whether its rows are in memory or in files.

    `KnowledgeBase.from_embeddings`, which takes them one by one, describes them.
    """

    num_prototypes: int = 512
    prototype_pairing: PrototypePairing = "matched"
    normalize_prototypes: bool = True
    clustering: Clustering = "spherical"
    index: str = "auto"
    seed: int = 0
    placement: Placement = "replicated"

    def check(self, shard: RowShard, *, is_in_files: bool) -> None:
        """Refuse settings that are unknown or do not go together."""
        check_choice("prototype_pairing", self.prototype_pairing, PAIRINGS)
        check_choice("clustering", self.clustering, CLUSTERINGS)
        check_choice("placement", self.placement, PLACEMENTS)
        check_count("num_prototypes", self.num_prototypes, 0)
        if is_in_files:
            check_memmap(self.prototype_pairing, self.placement, shard.ranks.size)

    def limited_to(self, shard: RowShard) -> int:
        """M, which is at most N."""
        if self.num_prototypes > shard.num_rows and shard.ranks.rank == 0:
            warn(
                f"There are fewer pairs ({shard.num_rows}) than prototypes asked for "
                f"({self.num_prototypes}): `num_prototypes` becomes {shard.num_rows}.",
                stacklevel=4,
            )
        return min(self.num_prototypes, shard.num_rows)


def check_memmap(prototype_pairing: str, placement: str, num_ranks: int) -> None:
    """Refuse what `storage="memmap"` cannot do.

    Args:
        prototype_pairing: How audio and text clusters become pairs.
        placement: `"replicated"` or `"sharded"`.
        num_ranks: Number of processes.

    Raises:
        ValueError: The pairing needs pairs as one table, or several ranks would each have all files.
    """
    if prototype_pairing == "joint":
        raise ValueError(
            'Argument `prototype_pairing` has to be another than "joint" with storage="memmap", because no '
            'file holds audio and text side by side, but got "joint". Take "matched".'
        )
    if placement != "sharded" and num_ranks > 1:
        raise ValueError(
            'Argument `placement` has to be "sharded" with storage="memmap" on several ranks, so that each '
            f"has the files of its shard, but got {placement!r}."
        )


@dataclass(frozen=True)
class RowIds:
    """What the pairs of this rank are called.

    Attributes:
        clips: `(n,)` int64, the clip of each pair.
        captions: `(n,)` int64, the caption of each pair; `None` where nobody has said.
    """

    clips: Tensor
    captions: Tensor | None

    @classmethod
    def of(
        cls,
        ids: Tensor | Sequence[int] | Sequence[str] | None,
        caption_ids: Tensor | Sequence[int] | Sequence[str] | None,
        shard: RowShard,
    ) -> RowIds:
        """The ids of this rank's pairs as integers.

        Args:
            ids: n clip identifiers, integers or strings; `None` for the row numbers.
            caption_ids: n caption identifiers, integers or strings; `None` where there are none.
            shard: Which of the pairs are this rank's.

        Raises:
            ValueError: There are ids of another number, or captions of clips without ids.
        """
        if ids is None and caption_ids is not None:
            raise ValueError(
                "Argument `caption_ids` tells the captions of a clip apart, so it needs `ids`, which say "
                "which clip a pair belongs to, but got None. Pass both."
            )
        clips = shard.global_rows() if ids is None else _one_for_each_pair("ids", ids, shard)
        captions = None if caption_ids is None else _one_for_each_pair("caption_ids", caption_ids, shard)
        return cls(clips, captions)


def _one_for_each_pair(name: str, ids: Tensor | Sequence[int] | Sequence[str], shard: RowShard) -> Tensor:
    """Ids as integers, one for each pair of this rank."""
    found = integer_ids(ids, name=name)
    if found.shape != (shard.num_local_rows,):
        raise ValueError(
            f"Argument `{name}` has to hold one id for each of the {shard.num_local_rows} pairs, "
            f"but got {tuple(found.shape)}."
        )
    return found
