"""Search that knows its hubs. Axes: `Q` queries of the bank, `B` queries, `N` gallery items, `d` width."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ask_lightning.utilities.arguments import check_choice, check_count, check_positive, check_range

CalibrationKind = Literal["inverted_softmax", "nearest_neighbors"]

# Scores held at a time, as in exact search.
_SCORES_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class Calibration:
    """How the scores of a search are calibrated by a bank of training queries.

    Args:
        kind: `"inverted_softmax"` or `"nearest_neighbors"`, see `hub_bias`.
        temperature: τ_b > 0, of the inverted softmax.
        num_neighbors: k ≥ 1, of the nearest neighbours; a smaller bank counts as a whole.
        weight: a ≥ 0, of the nearest neighbours.
        gate_top_k: Calibrate only queries whose best hit is among the best `gate_top_k` of a query of the
            bank, see `find_hubs`. None: all queries.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> calibration = Calibration("nearest_neighbors", num_neighbors=128, gate_top_k=1)
        >>> calibration.parameters
        {'kind': 'nearest_neighbors', 'num_neighbors': 128, 'weight': 0.75, 'gate_top_k': 1}
        >>> print(calibration)
        nearest_neighbors, num_neighbors=128, weight=0.75, gate_top_k=1
    """

    kind: CalibrationKind = "inverted_softmax"
    temperature: float = 0.1
    num_neighbors: int = 16
    weight: float = 0.75
    gate_top_k: int | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(CalibrationKind))
        check_positive("temperature", self.temperature)
        check_count("num_neighbors", self.num_neighbors)
        check_range("weight", self.weight, 0)
        if self.gate_top_k is not None:
            check_count("gate_top_k", self.gate_top_k)

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments that act, by name; they make an equivalent object."""
        of_kind = {"inverted_softmax": ("temperature",), "nearest_neighbors": ("num_neighbors", "weight")}
        gate = () if self.gate_top_k is None else ("gate_top_k",)
        return {name: getattr(self, name) for name in ("kind", *of_kind[self.kind], *gate)}

    def __str__(self) -> str:
        kind, *others = self.parameters.items()
        return ", ".join([kind[1], *(f"{name}={value}" for name, value in others)])


def hub_bias(gallery: Tensor, bank: Tensor, calibration: Calibration | None = None) -> Tensor:
    """How far each gallery item is everybody's neighbour, in units of the score.

    A few items are near to every query: hubs. How near an item is to the queries of the training set, whose
    answers are other items, is subtracted from its scores: `s'(q, r) = s(q, r) - bias(r)`.

    * `"inverted_softmax"`: `bias(r) = τ_b log mean_b exp(s(q_b, r) / τ_b)`, so that `s' / τ_b` is, up to a
      constant, the logarithm of a softmax over queries (Smith et al., arXiv 1702.03859).
    * `"nearest_neighbors"`: `bias(r) = a · mean of the k largest s(q_b, r)` (Chowdhury et al., arXiv
      2410.24114).

    Args:
        gallery: `(N, d)`, the items that are searched, of one modality; unit vectors.
        bank: `(Q, d)`, training queries of the other modality; unit vectors, at least one.
        calibration: Kind and parameters; None for the default ones.

    Returns:
        `(N,)`, in the dtype of the gallery. It depends on the training queries only, so each test query
        stands alone.

    Raises:
        ValueError: The bank is empty or of another width.

    Examples:
        >>> gallery = torch.eye(2)
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # the first item is near to both
        >>> hub_bias(gallery, bank, Calibration("nearest_neighbors", num_neighbors=2, weight=1.0))
        tensor([0.9000, 0.3000])
    """
    return hub_biases(gallery, bank, [calibration or Calibration()])[0]


def hub_biases(gallery: Tensor, bank: Tensor, calibrations: Sequence[Calibration]) -> Tensor:
    """The biases of several calibrations, for which the scores of the bank are computed once.

    Args:
        gallery: `(N, d)`, the items that are searched; unit vectors.
        bank: `(Q, d)`, training queries; unit vectors, at least one.
        calibrations: Kinds and parameters, at least one.

    Returns:
        `(len(calibrations), N)`, in the dtype of the gallery, as `hub_bias` returns them.

    Raises:
        ValueError: The bank is empty or of another width.

    Examples:
        >>> bank = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
        >>> hub_biases(torch.eye(2), bank, [Calibration(), Calibration(temperature=0.2)]).shape
        torch.Size([2, 2])
    """
    _check_bank(gallery, bank)
    blocks = [
        torch.stack([_bias_of_scores(scores, calibration) for calibration in calibrations])
        for scores in _score_blocks(gallery, bank)
    ]
    return torch.cat(blocks, dim=1) if blocks else gallery.new_empty(len(calibrations), 0)


def _bias_of_scores(scores: Tensor, calibration: Calibration) -> Tensor:
    """The bias `(block,)` of items with the scores `(block, Q)`."""
    num_queries = scores.shape[1]
    if calibration.kind == "inverted_softmax":
        total = (scores / calibration.temperature).logsumexp(dim=1) - math.log(num_queries)
        return calibration.temperature * total
    nearest = scores.topk(min(calibration.num_neighbors, num_queries), dim=1).values
    return calibration.weight * nearest.mean(dim=1)


def find_hubs(gallery: Tensor, bank: Tensor, top_k: int = 1) -> Tensor:
    """Which gallery items are among the best hits of some query of the bank: the activation set.

    A query whose best hit is none of them needs no calibration, which could only harm it: the gate of the
    dynamic inverted softmax (Bogolin et al., arXiv 2112.12777, section 3). A bank that is much larger than
    the gallery hits nearly every item, and then the gate is open for nearly every query.

    Args:
        gallery: `(N, d)`, the items that are searched; unit vectors.
        bank: `(Q, d)`, training queries; unit vectors, at least one.
        top_k: Number of best hits of each query of the bank that count, at least 1. Items that tie with the
            last of them count as well.

    Returns:
        `(N,)` boolean.

    Raises:
        ValueError: The bank is empty or of another width, or `top_k` is below 1.

    Examples:
        >>> find_hubs(torch.eye(3), torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]]))
        tensor([ True, False, False])
    """
    _check_bank(gallery, bank)
    check_count("top_k", top_k)
    is_hub = torch.zeros(len(gallery), dtype=torch.bool, device=gallery.device)
    if len(gallery) == 0:
        return is_hub
    for scores in _score_blocks(bank.to(gallery.dtype), gallery):  # (block, N)
        last = scores.topk(min(top_k, len(gallery)), dim=1).values[:, -1:]  # (block, 1)
        is_hub |= (scores >= last).any(dim=0)
    return is_hub


def calibrate_scores(scores: Tensor, bias: Tensor, hubs: Tensor | None = None) -> Tensor:
    """Subtract the bias of each gallery item, from all queries or from those whose best hit is a hub.

    Args:
        scores: `(B, N)`, similarities of queries and gallery items.
        bias: `(N,)` from `hub_bias`.
        hubs: `(N,)` boolean from `find_hubs`; a query passes the gate if a best-scoring item is one of them.
            None: no gate.

    Returns:
        `(B, N)`. Each row depends on its own scores only.

    Examples:
        >>> scores, bias = torch.tensor([[0.9, 0.8], [0.4, 0.7]]), torch.tensor([0.5, 0.0])
        >>> calibrate_scores(scores, bias, hubs=torch.tensor([True, False]))
        tensor([[0.4000, 0.8000],
                [0.4000, 0.7000]])
    """
    if hubs is None:
        return scores - bias
    is_best = scores == scores.amax(dim=1, keepdim=True)  # (B, N)
    is_gated = (is_best & hubs).any(dim=1, keepdim=True)  # (B, 1)
    return torch.where(is_gated, scores - bias, scores)


def _score_blocks(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Scores of all columns, `(block, columns)`, for some rows at a time."""
    columns = columns.to(rows.dtype)
    for block in rows.split(max(1, _SCORES_PER_BLOCK // len(columns))) if len(rows) else ():
        yield block @ columns.T


def _check_bank(gallery: Tensor, bank: Tensor) -> None:
    """Refuse a bank without queries or of another width."""
    if bank.ndim != 2 or len(bank) == 0 or bank.shape[1] != gallery.shape[-1]:
        raise ValueError(
            f"Argument `bank` has to be of shape (queries, {gallery.shape[-1]}) with at least one query, but "
            f"got {tuple(bank.shape)}. Encode the training pairs with the model that encoded the gallery."
        )
