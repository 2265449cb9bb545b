"""Stored audio–text pairs of which every rank holds a shard.

Axes: `B` batch, `K` neighbours, `Q` queries, `n` pairs of this rank, `N` pairs, `d` width, `R` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor

from ask_lightning.functional.drift import log_normalizers, softmax_divergence
from ask_lightning.knowledge.exact_search import Search, sort_candidates
from ask_lightning.knowledge.mapped_pairs import MappedPairs, drift_of_terms
from ask_lightning.knowledge.pairs import PairStore, StoredPairs, copy_cached, forget_cached
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.utilities.dtypes import computation_dtype


@dataclass(frozen=True)
class ShardedPairs:
    """Pairs of which this rank holds some; what searches or reads all of them is collective.

    Attributes:
        local: The `(n, d)` pairs of this rank; their `index` says how each rank searches its own rows.
        shard: Which of the N pairs the local ones are.

    Examples:
        >>> pairs = ShardedPairs(StoredPairs(torch.eye(2), torch.eye(2)), RowShard.unsharded(2))
        >>> len(pairs), pairs.audio.shape
        (2, torch.Size([2, 2]))
    """

    local: StoredPairs
    shard: RowShard

    def __len__(self) -> int:
        return self.shard.num_rows

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            'Knowledge of placement="sharded" belongs to the processes that hold its shards and cannot be '
            "sent to others. Save it instead: `knowledge.save(path)`."
        )

    @property
    def index(self) -> str:
        """The kind of search, see `build_search`."""
        return self.local.index

    @property
    def audio(self) -> Tensor:
        """All audio rows `(N, d)`, gathered anew at each access; collective."""
        return self.shard.gather(self.local.audio)

    @property
    def text(self) -> Tensor:
        """All text rows `(N, d)`, gathered anew at each access; collective."""
        return self.shard.gather(self.local.text)

    @cached_property
    def search_audio(self) -> Search:
        """The search over all audio rows."""
        return ShardedSearch(self.shard, self.local.search_audio if len(self.local) else None)

    @cached_property
    def search_text(self) -> Search:
        """The search over all text rows."""
        return ShardedSearch(self.shard, self.local.search_text if len(self.local) else None)

    @cached_property
    def is_bounded(self) -> bool:
        """Whether no row of any rank is longer than one, up to rounding."""
        return all(self.shard.ranks.all_gather_object(self.local.is_bounded))

    @cached_property
    def checksums(self) -> tuple[int, int]:
        """The `checksum` of all audio and of all text rows."""
        own = self.local.checksums_of(self.shard.global_rows())
        audio, text = zip(*self.shard.ranks.all_gather_object(own), strict=True)
        return sum(audio) % 2**64, sum(text) % 2**64

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """The mean audio row and the mean text row, `(d,)` each."""
        audio, text = (self.shard.ranks.sum(total) / len(self) for total in self.local.sums)
        return audio, text

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Audio and text `(..., d)` of the pairs with the numbers `rows` `(...)`, from their ranks."""
        audio, text = self.shard.fetch(rows, self.local.audio, self.local.text)
        return audio, text

    def replace(self, rows: Tensor, audio: Tensor, text: Tensor) -> None:
        """Write new unit vectors `(n, d)` over those of the pairs with the numbers `rows` that lie here."""
        owner, local_rows = self.shard.locate(rows)
        is_own = owner == self.shard.ranks.rank
        self.local.replace(local_rows[is_own], audio[is_own], text[is_own])
        forget_cached(self, "search_audio", "search_text", "checksums")

    def drift_from(self, stored: PairStore, rows: Tensor) -> tuple[Tensor, Tensor]:
        """RDM (Eq. 4) of each modality against older embeddings of the same pairs, see `PairStore`.

        Each rank compares the queries with its own rows.
        """
        current, older = self.local, stored.local
        if isinstance(current, MappedPairs):
            terms = self.shard.ranks.sum(current.drift_terms(older, *self.pairs(rows)))
            audio, text = drift_of_terms(terms)
            return audio, text
        sides = zip(self.pairs(rows), (current.audio, current.text), (older.audio, older.text), strict=True)
        drifts = []
        for side in sides:
            queries, own, before = (part.to(computation_dtype(part)) for part in side)
            scores, older_scores = queries @ own.T, queries @ before.T  # (Q, n)
            normalizers = torch.stack(
                self.shard.ranks.all_gather(log_normalizers(scores, older_scores))
            ).logsumexp(dim=0)  # (Q, 2)
            share = softmax_divergence(scores, older_scores, normalizers).sum()
            drifts.append(self.shard.ranks.sum(share) / len(queries))
        return drifts[0], drifts[1]

    def replicated(self) -> StoredPairs:
        """All pairs on every rank; collective."""
        return StoredPairs(self.audio, self.text, self.index, self.local.earlier)

    def to(self, device: torch.device | str) -> ShardedPairs:
        """The same pairs on another device."""
        moved = ShardedPairs(self.local.to(device), self.shard)
        return copy_cached(moved, self, "is_bounded", "checksums")


class ShardedSearch:
    """Search in which every rank looks through its own rows for the queries of all ranks.

    Args:
        shard: Which rows this rank holds.
        search_local: The search over the rows of this rank; `None` if there is none.
    """

    def __init__(self, shard: RowShard, search_local: Search | None) -> None:
        self._shard = shard
        self._search_local = search_local

    @property
    def kind(self) -> str:
        """How this rank searches its own rows."""
        return self._search_local.kind if self._search_local is not None else "exact"

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search as `Search` does; collective. Each rank passes its own queries, of any number."""
        ranks = self._shard.ranks
        # Rank by rank, as each would search alone: the number of queries decides how scores are rounded.
        blocks = ranks.all_gather(queries)
        found = [self._find_local(block, k) for block in blocks]
        scores, rows = (torch.cat(side) for side in zip(*found, strict=True))  # (ΣB, K)
        counts = [len(block) for block in blocks]
        received = [len(queries)] * ranks.size
        scores, rows = (ranks.all_to_all(side, counts, received)[0] for side in (scores, rows))  # (R B, K)
        scores, rows = (
            side.view(ranks.size, len(queries), k).transpose(0, 1).flatten(1) for side in (scores, rows)
        )  # (B, R K)
        scores, rows = sort_candidates(scores, rows)
        return scores[:, :k], rows[:, :k]

    def _find_local(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """This rank's K best rows by global number; a rank with fewer adds rows of score -inf."""
        shard = self._shard
        scores = queries.new_full((len(queries), k), -torch.inf, dtype=computation_dtype(queries))
        rows = torch.full((len(queries), k), shard.num_rows, device=queries.device)
        if self._search_local is not None:
            count = min(k, shard.num_local_rows)
            scores[:, :count], found = self._search_local(queries, count)
            rows[:, :count] = shard.to_global(found)
        return scores, rows
