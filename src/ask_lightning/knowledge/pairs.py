"""Stored audio–text pairs, and what a batch retrieves from them.

Axes: `B` batch, `K` neighbours, `Q` queries, `N` pairs, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ask_lightning.functional.drift import representation_drift
from ask_lightning.functional.reliability import reliability_potential
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.exact_search import Search
from ask_lightning.knowledge.faiss_search import TrainedIndex
from ask_lightning.knowledge.row_shard import RowShard, ShardedRows
from ask_lightning.knowledge.search import build_search
from ask_lightning.utilities.dtypes import computation_dtype

T = TypeVar("T")
Learnt = tuple[TrainedIndex | None, TrainedIndex | None]
"""What the indexes of the audio and of the text rows have learnt."""


@dataclass(frozen=True)
class Neighborhood:
    """What a batch retrieved from the fine or the coarse knowledge: all that Eq. 9–13 need.

    Attributes:
        audio_rows: `(B, K)`, R_a, the rows of the base that the batch's audio retrieved.
        text_rows: `(B, K)`, R_t, the rows that the batch's text retrieved.
        audio_by_audio: `(B, K, d)`, U[R_a].
        audio_by_text: `(B, K, d)`, U[R_t].
        text_by_audio: `(B, K, d)`, V[R_a].
        text_by_text: `(B, K, d)`, V[R_t].
    """

    audio_rows: Tensor
    text_rows: Tensor
    audio_by_audio: Tensor
    audio_by_text: Tensor
    text_by_audio: Tensor
    text_by_text: Tensor

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Neighborhood:
        """The same neighbours with a function applied to both tensors of row numbers."""
        return replace(self, audio_rows=function(self.audio_rows), text_rows=function(self.text_rows))

    def map_vectors(self, function: Callable[[Tensor], Tensor]) -> Neighborhood:
        """The same neighbours with a function applied to each of the four tensors of vectors."""
        return replace(
            self,
            audio_by_audio=function(self.audio_by_audio),
            audio_by_text=function(self.audio_by_text),
            text_by_audio=function(self.text_by_audio),
            text_by_text=function(self.text_by_text),
        )

    def means(self) -> tuple[Tensor, Tensor]:
        """ū, the mean of the audio that each audio retrieved, and v̄, that of text by text, `(B, d)` each."""
        return self.audio_by_audio.mean(dim=1), self.text_by_text.mean(dim=1)

    def potentials(
        self, audio: Tensor, text: Tensor, means: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The reliability potentials Ψ of the queries, Eq. 11–13.

        Args:
            audio: `(B, d)`, the audio embeddings that retrieved these neighbours, in their dtype.
            text: `(B, d)`, the text embeddings that retrieved them.
            means: What `means` returned, where it has been called already.

        Returns:
            Ψ of each query, `(B,)`, by direction: `"t2a"` and `"a2t"`.
        """
        of_audio, of_text = means or self.means()
        return {
            "t2a": reliability_potential(audio, self.audio_by_text, of_audio),
            "a2t": reliability_potential(text, self.text_by_audio, of_text),
        }

    def to(self, dtype: torch.dtype) -> Neighborhood:
        """The same neighbours with vectors of another floating dtype."""
        return self.map_vectors(lambda vectors: vectors.to(dtype))


class PairStore(Protocol):
    """Pairs of audio and text embeddings that can be searched and read, wherever their rows lie.

    Where the pairs are sharded, every member except `index`, `local`, `shard`, `to` and the length is
    collective: all ranks have to use it at the same time.
    """

    @property
    def index(self) -> str:
        """The kind of search, see `build_search`."""
        ...

    @property
    def local(self) -> StoredPairs:
        """The `(n, d)` pairs that this rank holds."""
        ...

    @property
    def shard(self) -> RowShard:
        """Which rows of all pairs the local ones are."""
        ...

    @property
    def audio(self) -> Tensor:
        """All audio rows, `(N, d)`."""
        ...

    @property
    def text(self) -> Tensor:
        """All text rows, `(N, d)`."""
        ...

    @property
    def search_audio(self) -> Search:
        """The search over all audio rows."""
        ...

    @property
    def search_text(self) -> Search:
        """The search over all text rows."""
        ...

    @property
    def is_bounded(self) -> bool:
        """Whether no row is longer than one, up to rounding: similarities are in [-1, 1], Ψ in [1/e, e]."""
        ...

    @property
    def checksums(self) -> tuple[int, int]:
        """The `checksum` of all audio and of all text rows."""
        ...

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """The mean audio row and the mean text row, `(d,)` each."""
        ...

    def __len__(self) -> int: ...

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Audio and text `(..., d)` of the pairs with the numbers `rows` `(...)`."""
        ...

    def replace(self, rows: Tensor, audio: Tensor, text: Tensor) -> None:
        """Write new embeddings over those of some pairs, in place; not collective.

        Args:
            rows: `(n,)` int64 numbers of pairs, each once; every rank passes the same.
            audio: `(n, d)` unit vectors.
            text: `(n, d)` unit vectors.
        """
        ...

    def drift_from(self, stored: PairStore, rows: Tensor) -> tuple[Tensor, Tensor]:
        """RDM (Eq. 4) of each modality against older embeddings of the same pairs.

        Args:
            stored: The older embeddings, with the same rows on every rank (`has_same_rows_as`).
            rows: `(Q,)`, numbers of the pairs that serve as queries.

        Returns:
            Drift of the audio and of the text, 0-d.
        """
        ...

    def to(self, device: torch.device | str) -> PairStore:
        """The same pairs on another device."""
        ...


@dataclass(frozen=True)
class StoredPairs:
    """Pairs that this process holds as a whole, and how to search each modality.

    Attributes:
        audio: `(N, d)`, U.
        text: `(N, d)`, V; row j of both is pair j.
        index: The kind of search, see `build_search`.
        earlier: What the Faiss indexes of an earlier base have learnt, audio and text.

    Examples:
        >>> pairs = StoredPairs(torch.eye(2), torch.eye(2).flip(0))
        >>> scores, rows = pairs.search_audio(torch.tensor([[0.8, 0.6]]), 1)
        >>> rows.tolist()
        [[0]]
    """

    audio: Tensor
    text: Tensor
    index: str = "exact"
    earlier: Learnt = (None, None)

    def __len__(self) -> int:
        return len(self.audio)

    def __reduce__(self) -> tuple[type[StoredPairs], tuple[Tensor, Tensor, str]]:
        # Indexes do not travel to other processes; they are rebuilt there when first asked for.
        return type(self), (self.audio, self.text, self.index)

    @property
    def local(self) -> StoredPairs:
        """These pairs."""
        return self

    @property
    def shard(self) -> RowShard:
        """All rows, on this process."""
        return RowShard.unsharded(len(self))

    # Built when first asked for: a base that is only compared or saved needs no index.
    @cached_property
    def search_audio(self) -> Search:
        """The search over all audio rows."""
        return build_search(self.audio, self.index, self.earlier[0])

    @cached_property
    def search_text(self) -> Search:
        """The search over all text rows."""
        return build_search(self.text, self.index, self.earlier[1])

    @property
    def learnt(self) -> Learnt:
        """What the indexes have learnt, for those of the base after this one."""
        searches = (vars(self).get(name) for name in ("search_audio", "search_text"))
        audio, text = (
            given if search is None else getattr(search, "trained", None)
            for search, given in zip(searches, self.earlier, strict=True)
        )
        return audio, text

    def coarse_like(self) -> Tensor:
        """An empty table `(0, d)` for prototypes of these pairs."""
        return torch.empty(0, self.audio.shape[1], dtype=computation_dtype(self.audio), device=self.device)

    @cached_property
    def is_bounded(self) -> bool:
        """Whether no row is longer than one, up to rounding."""
        return all(are_bounded(side) for side in (self.audio, self.text))

    @cached_property
    def checksums(self) -> tuple[int, int]:
        """The `checksum` of all audio and of all text rows."""
        return checksum(self.audio), checksum(self.text)

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """The mean audio row and the mean text row, `(d,)` each."""
        audio, text = (total / len(self) for total in self.sums)
        return audio, text

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """The sum of the audio rows and that of the text rows, `(d,)` each."""
        audio, text = (side.sum(dim=0, dtype=computation_dtype(side)) for side in (self.audio, self.text))
        return audio, text

    @property
    def device(self) -> torch.device:
        """The device of queries and results."""
        return self.audio.device

    @property
    def num_bytes(self) -> int:
        """Memory that the rows take."""
        return self.audio.nbytes + self.text.nbytes

    def tables(self, shard: RowShard) -> tuple[ShardedRows, ShardedRows]:
        """The audio rows and the text rows as tables of which these are a shard."""
        return ShardedRows(self.audio, shard), ShardedRows(self.text, shard)

    def checksums_of(self, numbers: Tensor) -> tuple[int, int]:
        """The `checksum` of the audio and of the text rows, under the numbers `(n,)` that they have."""
        return checksum(self.audio, numbers), checksum(self.text, numbers)

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Audio and text `(..., d)` of the pairs with the numbers `rows` `(...)`."""
        return self.audio[rows], self.text[rows]

    def replace(self, rows: Tensor, audio: Tensor, text: Tensor) -> None:
        """Write new unit vectors `(n, d)` over those of the pairs with the numbers `rows` `(n,)`."""
        self.audio[rows], self.text[rows] = audio.to(self.audio), text.to(self.text)
        object.__setattr__(self, "earlier", self.learnt)  # the next indexes need not learn from scratch
        # Unit vectors take the place of rows that were as long, so what is bounded stays so.
        forget_cached(self, "search_audio", "search_text", "checksums")

    def drift_from(self, stored: PairStore, rows: Tensor) -> tuple[Tensor, Tensor]:
        """RDM (Eq. 4) of each modality against older embeddings of the same pairs, see `PairStore`."""
        sides = zip(self.pairs(rows), (self.audio, self.text), (stored.audio, stored.text), strict=True)
        audio, text = (
            representation_drift(*(part.to(computation_dtype(part)) for part in side)) for side in sides
        )
        return audio, text

    def astype(self, dtype: torch.dtype) -> StoredPairs:
        """The same pairs in another floating dtype."""
        return StoredPairs(self.audio.to(dtype), self.text.to(dtype), self.index, self.earlier)

    def to(self, device: torch.device | str) -> StoredPairs:
        """The same pairs on another device."""
        moved = StoredPairs(self.audio.to(device), self.text.to(device), self.index, self.learnt)
        return copy_cached(moved, self, "is_bounded", "checksums")


def read_neighborhood(pairs: PairStore, audio_rows: Tensor, text_rows: Tensor) -> Neighborhood:
    """The neighbours of a batch, given their row numbers.

    Args:
        pairs: The pairs that were searched; reading them is collective where they are sharded.
        audio_rows: `(B, K)`, rows that the audio retrieved.
        text_rows: `(B, K)`, rows that the text retrieved.
    """
    audio, text = pairs.pairs(torch.stack([audio_rows, text_rows]))  # (2, B, K, d)
    return Neighborhood(audio_rows, text_rows, audio[0], audio[1], text[0], text[1])


def are_bounded(rows: Tensor) -> bool:
    """Whether no row `(n, d)` is longer than one, up to the rounding of unit vectors in their dtype."""
    # Unit vectors stored in half precision are a little longer or shorter.
    longest = 1 + max(1e-5, 2 * torch.finfo(rows.dtype).eps)
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=computation_dtype(rows))
    return bool((lengths <= longest).all())


def forget_cached(changed: object, *names: str) -> None:
    """Have cached properties computed anew when they are next asked for."""
    for name in names:
        vars(changed).pop(name, None)


def copy_cached(copy: T, original: T, *names: str) -> T:
    """Give a copy the cached properties that its original has computed already.

    Computing them again may be collective, which one rank alone must not start.
    """
    vars(copy).update({name: vars(original)[name] for name in names if name in vars(original)})
    return copy
