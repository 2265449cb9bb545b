"""One granularity of knowledge: paired rows, held whole by every rank or spread over the ranks.

Axes: `B` batch, `K` neighbours, `N` rows, `n` rows of this rank, `d` width, `R` ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ask_lightning.functional.drift import representation_drift
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.row_shard import Part
from ask_lightning.knowledge.search import Search, build_search, ordered
from ask_lightning.utilities.distributed import Ranks

T = TypeVar("T")


class Neighborhood(NamedTuple):
    """What a batch retrieved from one granularity: all that Eq. 9–13 need.

    Attributes:
        audio_rows: `(B, K)`, R_a, rows of the base retrieved by the batch's audio.
        text_rows: `(B, K)`, R_t, rows retrieved by the batch's text.
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


@dataclass(frozen=True)
class Granularity:
    """Paired rows and how to search each modality.

    Attributes:
        audio: `(N, d)` or `(M, d)`, U.
        text: The same shape, V; row j of both is pair j.
        index: See `build_search`.

    Examples:
        >>> pairs = Granularity(torch.eye(2), torch.eye(2).flip(0))
        >>> scores, rows = pairs.search_audio(torch.tensor([[0.8, 0.6]]), 1)
        >>> rows.tolist()
        [[0]]
    """

    audio: Tensor
    text: Tensor
    index: str = "exact"

    def __len__(self) -> int:
        return len(self.audio)

    def __reduce__(self) -> tuple[type[Granularity], tuple[Tensor, Tensor, str]]:
        # Indexes do not travel to other processes; they are rebuilt there when first asked for.
        return type(self), (self.audio, self.text, self.index)

    # Built when first asked for: a base that is only compared or saved needs no index.
    @cached_property
    def search_audio(self) -> Search:
        """Search over the audio rows."""
        return build_search(self.audio, self.index)

    @cached_property
    def search_text(self) -> Search:
        """Search over the text rows."""
        return build_search(self.text, self.index)

    @cached_property
    def longest(self) -> float:
        """Length of the longest row; at most 1 keeps similarities in [-1, 1] and Ψ in [1/e, e]."""
        sides = (self.audio, self.text)
        lengths = [torch.linalg.vector_norm(side, dim=1, dtype=_scores(side)) for side in sides]
        return float(torch.cat(lengths).max())

    @cached_property
    def checksums(self) -> tuple[int, int]:
        """`checksum` of the audio and of the text rows."""
        return checksum(self.audio), checksum(self.text)

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean audio row and mean text row, `(d,)` each."""
        audio, text = (side.mean(dim=0, dtype=_scores(side)) for side in (self.audio, self.text))
        return audio, text

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Audio and text `(..., d)` of the pairs with these numbers `(...)`."""
        return self.audio[rows], self.text[rows]

    def drift_from(self, stored: Granularity, rows: Tensor) -> tuple[Tensor, Tensor]:
        """RDM (Eq. 4) of each modality against the same pairs' older embeddings.

        Args:
            stored: The older embeddings; row j of both is the same pair.
            rows: `(Q,)`, the pairs that are the queries.

        Returns:
            Drift of the audio and of the text, 0-d.
        """
        sides = zip(self.pairs(rows), (self.audio, self.text), (stored.audio, stored.text), strict=True)
        audio, text = (representation_drift(*(part.to(_scores(part)) for part in side)) for side in sides)
        return audio, text

    def neighborhood(self, audio_rows: Tensor, text_rows: Tensor) -> Neighborhood:
        """The rows' vectors of both modalities."""
        audio, text = self.pairs(torch.stack([audio_rows, text_rows]))  # (2, B, K, d)
        return Neighborhood(audio_rows, text_rows, audio[0], audio[1], text[0], text[1])

    def to(self, device: torch.device | str) -> Granularity:
        """The same rows on another device."""
        moved = type(self)(self.audio.to(device), self.text.to(device), self.index)
        return with_known(moved, self, "longest", "checksums")


@dataclass(frozen=True)
class SpreadGranularity(Granularity):
    """Rows of which each rank has its part. What searches or fetches is collective.

    Attributes:
        audio: `(n, d)`, this rank's rows.
        text: The same shape.
        index: See `build_search`; each rank searches its own rows by it.
        part: Which rows of the N these are.
    """

    part: Part = field(default_factory=lambda: Part.dealt(0, Ranks()))

    def __len__(self) -> int:
        return self.part.total

    def __reduce__(self) -> tuple[type[Granularity], tuple[Tensor, Tensor, str]]:
        raise TypeError(
            'Knowledge of placement="sharded" belongs to the processes that hold its parts and cannot be '
            "sent to others. Save it instead: `knowledge.save(path)`."
        )

    @cached_property
    def search_audio(self) -> Search:
        """Search over all ranks' audio rows."""
        return SearchOverRanks(self.audio, self.index, self.part)

    @cached_property
    def search_text(self) -> Search:
        """Search over all ranks' text rows."""
        return SearchOverRanks(self.text, self.index, self.part)

    @cached_property
    def longest(self) -> float:
        """See `Granularity`."""
        own = super().longest if len(self.audio) else 0.0
        return float(max(self.part.ranks.all_gather_object(own)))

    @cached_property
    def checksums(self) -> tuple[int, int]:
        """See `Granularity`."""
        numbers = self.part.rows()
        own = checksum(self.audio, numbers), checksum(self.text, numbers)
        audio, text = zip(*self.part.ranks.all_gather_object(own), strict=True)
        return sum(audio) % 2**64, sum(text) % 2**64

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        """See `Granularity`."""
        sums = (side.sum(dim=0, dtype=_scores(side)) for side in (self.audio, self.text))
        audio, text = (self.part.ranks.sum(total) / len(self) for total in sums)
        return audio, text

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Granularity`; from the ranks that have them."""
        audio, text = self.part.fetch(rows, self.audio, self.text)
        return audio, text

    def drift_from(self, stored: Granularity, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Granularity`; each rank compares the queries with its own rows."""
        drifts = []
        sides = zip(self.pairs(rows), (self.audio, self.text), (stored.audio, stored.text), strict=True)
        for side in sides:
            queries, current, before = (part.to(_scores(part)) for part in side)
            now, then = queries @ current.T, queries @ before.T  # (Q, n)
            normalizers = torch.stack([now.logsumexp(dim=1), then.logsumexp(dim=1)], dim=1)  # (Q, 2)
            everyone = torch.stack(self.part.ranks.all_gather(normalizers))  # (R, Q, 2)
            log_now, log_then = everyone.logsumexp(dim=0).T  # (Q,) each
            difference = (now - log_now[:, None]) - (then - log_then[:, None])
            own = ((now - log_now[:, None]).exp() * difference).sum()
            drifts.append(self.part.ranks.sum(own) / len(queries))
        return drifts[0], drifts[1]

    def to(self, device: torch.device | str) -> SpreadGranularity:
        """The same rows on another device."""
        moved = type(self)(self.audio.to(device), self.text.to(device), self.index, self.part)
        return with_known(moved, self, "longest", "checksums")


class SearchOverRanks:
    """Search in which every rank looks through its own rows for the queries of all.

    Args:
        vectors: `(n, d)`, this rank's rows.
        index: See `build_search`.
        part: Which rows these are.
    """

    def __init__(self, vectors: Tensor, index: str, part: Part) -> None:
        self._vectors, self._part = vectors, part
        self._search = build_search(vectors, index) if len(vectors) else None

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Search`; collective. Each rank brings its own queries, perhaps of another number."""
        ranks = self._part.ranks
        # Rank by rank, as each would search alone: the number of queries decides how scores are rounded.
        everyone = ranks.all_gather(queries)
        found = [self._own(block, k) for block in everyone]
        scores, rows = (torch.cat(side) for side in zip(*found, strict=True))  # (ΣB, K)
        counts = [len(block) for block in everyone]
        back = [len(queries)] * ranks.size
        candidates, numbers = (ranks.all_to_all(side, counts, back)[0] for side in (scores, rows))  # (R B, K)
        candidates, numbers = (
            side.view(ranks.size, len(queries), k).transpose(0, 1).flatten(1)
            for side in (candidates, numbers)
        )  # (B, R K)
        scores, rows = ordered(candidates, numbers)
        return scores[:, :k], rows[:, :k]

    def _own(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """This rank's best, filled up with rows behind the last one."""
        scores = queries.new_full((len(queries), k), -torch.inf, dtype=_scores(self._vectors))
        rows = torch.full((len(queries), k), self._part.total, device=queries.device)
        if self._search is not None:
            most = min(k, len(self._vectors))
            scores[:, :most], own = self._search(queries, most)
            rows[:, :most] = self._part.numbers(own)
        return scores, rows


def with_known(copy: T, original: T, *names: str) -> T:
    """A copy with what its original has computed already: on several ranks that is collective."""
    vars(copy).update({name: vars(original)[name] for name in names if name in vars(original)})
    return copy


def _scores(vectors: Tensor) -> torch.dtype:
    """What is computed from vectors that may be stored in half precision."""
    return torch.float64 if vectors.dtype == torch.float64 else torch.float32
