"""The best rows of an encoded file for a query. Axes: `N` rows of a side, `d` width, `n` candidates."""

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ask_lightning.cli.encoded_pairs import EncodedPairs, Side
from ask_lightning.knowledge.exact_search import Search, stable_topk

CALIBRATED_CANDIDATES = 1000
"""Number of best rows by cosine among which an index finds the best calibrated ones (docs/benchmarks.md)."""

_CANDIDATES = 100
# So many of the best rows are examined by a filter one by one, and asked of an index; if too few pass,
# all that pass are looked for.
_MOST_EXAMINED = 10_000
_GROWTH = 8
_VALUES_AT_ONCE = 1 << 20


class RowFilter(Protocol):
    """Tells which rows may be found."""

    def __call__(self, row: int) -> bool:
        """Whether a row may be found."""
        ...

    def rows(self) -> Tensor:
        """All rows that may be found, rising, `(n,)` int64."""
        ...


class RankedRows(NamedTuple):
    """Rows for a query, best first.

    Attributes:
        scores: What they are sorted by, `(n,)`: the calibrated scores, or the cosines.
        cosines: Cosine similarities, `(n,)`.
        rows: Their numbers, `(n,)` int64.
    """

    scores: Tensor
    cosines: Tensor
    rows: Tensor

    def take(self, places: Tensor | list[int]) -> "RankedRows":
        """Some of the rows.

        Args:
            places: Their places, in the order in which they are wanted.
        """
        return RankedRows(*(each[places] for each in self))

    def best(self, count: int) -> "RankedRows":
        """The rows with the highest scores, best first; rows with equal scores keep their order.

        Args:
            count: Largest number of rows.
        """
        return self.take(self.scores.argsort(descending=True, stable=True)[:count])


def best_rows(
    pairs: EncodedPairs,
    side: Side,
    query: Tensor,
    count: int,
    *,
    index: Search | None = None,
    passes: RowFilter | None = None,
) -> RankedRows:
    """Find the best rows of a side for a query.

    By an index, its best candidates get their exact scores, calibrated ones where the pairs have them, and
    are sorted by these. Rows with equal scores keep their order.

    Args:
        pairs: The encoded clips and captions.
        side: `"audio"` to find clips, `"text"` to find captions.
        query: Unit vector `(d,)`, float32.
        count: Number of rows to find, at least 1.
        index: Search by an index. None: all rows are compared.
        passes: Filter of the rows. None: all may be found. Where few of the best rows pass, all are compared.

    Returns:
        As many rows as there are, at most `count`.
    """
    total = len(getattr(pairs, side))
    all_scores: tuple[Tensor, Tensor] | None = None
    number = min(count, total)
    while True:
        if index is not None and number <= _MOST_EXAMINED and number < total:
            ranked = _ranked_by_index(pairs, side, query, number, index)
        else:
            all_scores = all_scores or _score_all(pairs, side, query)
            scores, cosines = all_scores
            rows = stable_topk(scores[None], number)[0]
            ranked = RankedRows(scores[rows], cosines[rows], rows).best(number)
        if passes is None:
            return ranked
        kept = [place for place, row in enumerate(ranked.rows.tolist()) if passes(row)][:count]
        if len(kept) == count or number == total:
            return ranked.take(kept)
        number = min(total, _GROWTH * number)
        if number > _MOST_EXAMINED:
            break
    scores, cosines = all_scores or _score_all(pairs, side, query)
    rows = passes.rows()
    return RankedRows(scores[rows], cosines[rows], rows).best(count)


def _ranked_by_index(
    pairs: EncodedPairs, side: Side, query: Tensor, number: int, index: Search
) -> RankedRows:
    """The best `number` rows among the candidates of an index."""
    vectors = getattr(pairs, side)
    least = _CANDIDATES if pairs.calibration is None else CALIBRATED_CANDIDATES
    rows = index(query[None], min(max(2 * number, least), len(vectors)))[1][0].sort().values  # (n,)
    cosines = _cosines(vectors[rows], query)
    scores = cosines
    if pairs.calibration is not None:
        of_rows: dict[str, Any] = {
            name: values[rows] for name, values in pairs.calibration.tensors.items() if name.startswith(side)
        }
        scores = replace(pairs.calibration, **of_rows).calibrate(cosines[None], side)[0]
    return RankedRows(scores, cosines, rows).best(number)


def _score_all(pairs: EncodedPairs, side: Side, query: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and cosines `(N,)` of all rows."""
    cosines = _cosines(getattr(pairs, side), query)
    if pairs.calibration is None:
        return cosines, cosines
    return pairs.calibration.calibrate(cosines[None], side)[0], cosines


def _cosines(vectors: Tensor, query: Tensor) -> Tensor:
    """The inner products `(n,)` of rows `(n, d)` and a query `(d,)`.

    A matrix product would round by where a row stands and by how many there are: equal rows would not tie,
    and an index would give a row another score than the comparison of all.
    """
    # In blocks, because rows in half precision are widened.
    blocks = vectors.split(max(1, _VALUES_AT_ONCE // vectors.shape[1]))
    return torch.cat([torch.linalg.vecdot(block.to(query.dtype), query) for block in blocks])
