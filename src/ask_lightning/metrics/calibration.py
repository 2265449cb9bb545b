"""Calibrated search: the bank, what it says about a gallery, and the choice of its parameters.

Axes: `N` pairs, `C` clips, `P` captions, `d` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ask_lightning.functional.calibration import Calibration, calibrate_scores, find_hubs, hub_biases
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.metrics.functional import (
    RetrievalRanks,
    check_rows,
    retrieval_ranks,
    retrieval_scores,
)
from ask_lightning.metrics.grid import unit_clips, unit_rows
from ask_lightning.metrics.table import mean_recall
from ask_lightning.utilities.arguments import check_choice
from ask_lightning.utilities.clip_ids import integer_ids

CALIBRATIONS: tuple[Calibration, ...] = (
    *(Calibration("inverted_softmax", temperature=value) for value in (0.05, 0.1, 0.2)),
    *(
        Calibration("nearest_neighbors", num_neighbors=count, weight=weight)
        for count, weight in product((16, 128), (0.5, 0.75, 1.0))
    ),
)
"""The calibrations that `choose_calibration` tries; then the best of them with the gate."""


@dataclass(frozen=True, eq=False)
class QueryBank:
    """Training pairs as queries: captions, by which clips are calibrated, and clips, by which captions are.

    Attributes:
        audio: `(C, d)`, unit vectors of the clips, each once.
        text: `(P, d)`, unit vectors of the captions.

    Raises:
        ValueError: The two are not floating matrices of one width with at least one finite row each.

    Examples:
        >>> bank = QueryBank.from_pairs(torch.eye(3), torch.eye(3), torch.tensor([5, 6, 6]))
        >>> bank.audio.shape, bank.text.shape
        (torch.Size([2, 3]), torch.Size([3, 3]))
    """

    audio: Tensor
    text: Tensor

    def __post_init__(self) -> None:
        for name, rows in (("audio", self.audio), ("text", self.text)):
            fits = rows.ndim == 2 and rows.is_floating_point() and len(rows) > 0
            if not fits or rows.shape[1] != self.audio.shape[-1] or not rows.isfinite().all():
                raise ValueError(
                    f"Argument `{name}` of a bank has to be a finite floating tensor of shape (rows, width), "
                    f"of the width of the other one and with at least one row, but got {rows.dtype} of shape "
                    f"{tuple(rows.shape)}. Encode the training pairs anew."
                )

    def __deepcopy__(self, memo: dict[int, object]) -> QueryBank:
        # It never changes, and copies of a metric must not double it.
        return self

    @classmethod
    def from_pairs(cls, audio: Tensor, text: Tensor, clip_ids: Tensor | Sequence[int | str]) -> QueryBank:
        """Make a bank of training pairs.

        Args:
            audio: Audio embeddings `(N, d)` of any length. The rows of one clip are averaged.
            text: Text embeddings `(N, d)` of any length.
            clip_ids: Ids of the clips, `(N,)` integers or strings.

        Raises:
            ValueError: Shapes or dtypes do not fit, there is no row, or an embedding has NaN or Inf.
        """
        clips = integer_ids(clip_ids, name="clip_ids").to(audio.device)
        check_rows(audio, text, clips)
        return cls(unit_clips(audio, clips)[0].float(), unit_rows(text).float())

    @classmethod
    def from_knowledge(cls, knowledge: KnowledgeBase) -> QueryBank:
        """Make a bank of all pairs of a knowledge base, such as the last one of a run.

        The encoders have moved since the knowledge was encoded; where that matters, encode the training pairs
        anew. On a sharded base this is collective, and every rank gets the whole bank.

        Args:
            knowledge: The base, whose pairs have to be training pairs.
        """
        return cls.from_pairs(knowledge.fine.audio, knowledge.fine.text, knowledge.ids)

    def to(self, device: torch.device | str) -> QueryBank:
        """The same bank on another device."""
        return QueryBank(self.audio.to(device), self.text.to(device))


@dataclass(frozen=True, eq=False)
class HubCalibration:
    """A calibration of one gallery: what is subtracted from the scores of its clips and its captions.

    Made once by `from_bank`; each query is then calibrated by itself.

    Attributes:
        calibration: Kind and parameters.
        audio_bias: `(C,)`, bias of each clip, for captions as the queries.
        text_bias: `(P,)`, bias of each caption, for clips as the queries.
        audio_hubs: `(C,)` boolean, the clips that let a query through the gate. None without a gate.
        text_hubs: `(P,)` boolean, the same of the captions.

    Examples:
        >>> bank = QueryBank(torch.eye(2), torch.tensor([[1.0, 0.0], [0.8, 0.6]]))
        >>> hubs = HubCalibration.from_bank(bank, torch.eye(2), torch.eye(2))
        >>> hubs.calibrate(torch.tensor([[0.8, 0.6]]), "audio")  # the first clip is near to both captions
        tensor([[-0.1434,  0.0691]])
    """

    calibration: Calibration
    audio_bias: Tensor
    text_bias: Tensor
    audio_hubs: Tensor | None = None
    text_hubs: Tensor | None = None

    @classmethod
    def from_bank(
        cls, bank: QueryBank, audio: Tensor, text: Tensor, calibration: Calibration | None = None
    ) -> HubCalibration:
        """Calibrate the clips and the captions of a gallery.

        Args:
            bank: The training queries.
            audio: `(C, d)`, embeddings of the clips, of any length.
            text: `(P, d)`, embeddings of the captions, of any length.
            calibration: Kind and parameters; None for the default ones.

        Raises:
            ValueError: The bank is of another width.
        """
        (made,) = cls.from_bank_by_each(bank, audio, text, [calibration or Calibration()])
        return made

    @classmethod
    def from_bank_by_each(
        cls, bank: QueryBank, audio: Tensor, text: Tensor, calibrations: Sequence[Calibration]
    ) -> list[HubCalibration]:
        """Calibrate a gallery by each of several calibrations, with the scores of the bank computed once.

        Args:
            bank: The training queries.
            audio: `(C, d)`, embeddings of the clips, of any length.
            text: `(P, d)`, embeddings of the captions, of any length.
            calibrations: Kinds and parameters.

        Returns:
            One object for each calibration, with float64 biases on the device of the gallery.

        Raises:
            ValueError: The bank is of another width.
        """
        kinds = list(dict.fromkeys(replace(one, gate_top_k=None) for one in calibrations))
        gates = {one.gate_top_k for one in calibrations} - {None}
        biases, hubs = [], []
        for rows, queries in ((audio, bank.text), (text, bank.audio)):
            gallery, queries = unit_rows(rows), unit_rows(queries.to(rows.device))
            biases.append(dict(zip(kinds, hub_biases(gallery, queries, kinds), strict=True)))
            hubs.append({top_k: find_hubs(gallery, queries, top_k) for top_k in gates if top_k is not None})
        return [
            cls(
                one,
                *(bias[replace(one, gate_top_k=None)] for bias in biases),
                *(hub.get(one.gate_top_k) if one.gate_top_k is not None else None for hub in hubs),
            )
            for one in calibrations
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are by their names, which are those of arguments of `retrieval_ranks`."""
        names = ("audio_bias", "text_bias", "audio_hubs", "text_hubs")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def calibrate(self, scores: Tensor, candidates: str) -> Tensor:
        """Calibrate the scores of queries.

        Args:
            scores: `(B, C)` cosine similarities to the clips, or `(B, P)` to the captions.
            candidates: `"audio"` if the columns are the clips, `"text"` if they are the captions.

        Returns:
            Scores of the same shape and dtype. Each row depends on its own scores only.

        Raises:
            ValueError: `candidates` is neither.
        """
        check_choice("candidates", candidates, ("audio", "text"))
        bias, hubs = getattr(self, f"{candidates}_bias"), getattr(self, f"{candidates}_hubs")
        return calibrate_scores(scores, bias.to(scores), None if hubs is None else hubs.to(scores.device))


def calibrated_ranks(
    audio: Tensor,
    text: Tensor,
    clip_ids: Tensor,
    bank: QueryBank,
    calibrations: Sequence[Calibration],
    *,
    block_size: int = 2048,
) -> list[RetrievalRanks]:
    """Rank pairs in calibrated search, once for each calibration.

    Args:
        audio: Audio embeddings `(N, d)`. Row i is the clip that caption i describes.
        text: Text embeddings `(N, d)`.
        clip_ids: Ids of the clips, `(N,)` integers.
        bank: The training queries.
        calibrations: Kinds and parameters.
        block_size: Side of the largest block of scores, at least 1.

    Returns:
        The ranks by each calibration, as `retrieval_ranks` returns them.

    Raises:
        ValueError: As in `retrieval_ranks`, or the bank is of another width.

    Examples:
        >>> bank = QueryBank(torch.eye(2), torch.eye(2))
        >>> (ranks,) = calibrated_ranks(torch.eye(2), torch.eye(2), torch.arange(2), bank, [Calibration()])
        >>> ranks.text_to_audio
        tensor([1, 1])
    """
    check_rows(audio, text, clip_ids)
    clips, clip_of = unit_clips(audio, clip_ids)  # (C, d), (N,)
    ranks = []
    for hubs in HubCalibration.from_bank_by_each(bank, clips, text, calibrations):
        of_rows = {
            name: values[clip_of] if name.startswith("audio") else values
            for name, values in hubs.tensors.items()
        }
        ranks.append(retrieval_ranks(audio, text, clip_ids, **of_rows, block_size=block_size))
    return ranks


def choose_calibration(
    audio: Tensor,
    text: Tensor,
    clip_ids: Tensor,
    bank: QueryBank,
    calibrations: Sequence[Calibration] = CALIBRATIONS,
    *,
    block_size: int = 2048,
) -> Calibration:
    """Choose the calibration with the highest mean recall on validation pairs.

    The best of several is tried with a gate as well, which only serves where that is better still.

    Args:
        audio: Audio embeddings `(N, d)` of the validation split, never of the test split.
        text: Text embeddings `(N, d)`.
        clip_ids: Ids of the clips, `(N,)` integers.
        bank: The training queries.
        calibrations: Kinds and parameters to choose from; of equally good ones the first is taken.
        block_size: Side of the largest block of scores, at least 1.

    Returns:
        The best of `calibrations`, perhaps with `gate_top_k=1`.

    Raises:
        ValueError: As in `retrieval_ranks`, the bank is of another width, or there is nothing to choose from.

    Examples:
        >>> bank = QueryBank(torch.eye(2), torch.eye(2))
        >>> choose_calibration(torch.eye(2), torch.eye(2), torch.arange(2), bank) == CALIBRATIONS[0]
        True
    """
    if not calibrations:
        raise ValueError("Argument `calibrations` has to hold at least one calibration, but is empty.")

    def best_of(tried: Sequence[Calibration]) -> tuple[float, Calibration]:
        ranks = calibrated_ranks(audio, text, clip_ids, bank, tried, block_size=block_size)
        recalls = [mean_recall(retrieval_scores(one)) for one in ranks]
        return max(recalls), tried[recalls.index(max(recalls))]

    recall, best = best_of(calibrations)
    gated_recall, gated = best_of([replace(best, gate_top_k=1)])
    return gated if gated_recall > recall else best
