"""The knowledge base: what is remembered of all source pairs, and how a batch looks it up.

Axes: `B` batch, `K` neighbours, `N` pairs, `M` prototypes, `d` width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple
from warnings import warn

import torch
from torch import Tensor

from ask_lightning.clip_ids import integer_ids
from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.prototypes import PAIRINGS, PrototypePairing, build_prototypes
from ask_lightning.knowledge.search import Search, build_search
from ask_lightning.knowledge.snapshot import SnapshotError, read_snapshot, write_snapshot

GranularityName = Literal["fine", "coarse"]
GRANULARITIES: tuple[GranularityName, ...] = ("fine", "coarse")

_ROWS_NAMED_IN_AN_ERROR = 5


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
    """One granularity of knowledge: paired rows and how to search each modality.

    Attributes:
        audio: `(N, d)` or `(M, d)`, U.
        text: The same shape, V; row j of both is pair j.
        index: See `build_search`.
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
        rows = (self.audio, self.text)
        return max(float(torch.linalg.vector_norm(side, dim=1).max()) for side in rows)

    def neighborhood(self, audio_rows: Tensor, text_rows: Tensor) -> Neighborhood:
        """The rows' vectors of both modalities."""
        return Neighborhood(
            audio_rows,
            text_rows,
            self.audio[audio_rows],
            self.audio[text_rows],
            self.text[audio_rows],
            self.text[text_rows],
        )


class KnowledgeBase:
    """All source pairs (fine) and their prototypes (coarse), ready to be looked up.

    Immutable: a refresh makes a new one. Made by `from_embeddings` or `load`.

    Attributes:
        fine: The pairs, Eq. 7.
        coarse: The prototypes, Eq. 8.
        ids: `(N,)` int64, the clip that each pair belongs to; a clip may have several pairs.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 100, 16, generator=generator)
        >>> base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=8)
        >>> base
        KnowledgeBase(100 pairs, 8 prototypes, width 16, index='auto', cpu)
        >>> base.lookup(audio[:4], text[:4], k=3)["fine"].audio_rows.shape
        torch.Size([4, 3])
    """

    def __init__(self, fine: Granularity, coarse: Granularity, ids: Tensor) -> None:
        self.fine = fine
        self.coarse = coarse
        self.ids = ids

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.fine)} pairs, {len(self.coarse)} prototypes, "
            f"width {self.width}, index={self.fine.index!r}, {self.device})"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> KnowledgeBase:
        # Nothing in it ever changes, and copies of a model (weight averaging) must not double it.
        return self

    @property
    def width(self) -> int:
        """d, the width of the embeddings."""
        return self.fine.audio.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the base lies; queries have to be there."""
        return self.fine.audio.device

    @classmethod
    def from_embeddings(
        cls,
        audio: Tensor,
        text: Tensor,
        *,
        ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        num_prototypes: int = 512,
        prototype_pairing: PrototypePairing = "matched",
        normalize_prototypes: bool = True,
        index: str = "auto",
        seed: int = 0,
    ) -> KnowledgeBase:
        """Build the base from the embeddings of all source pairs.

        Args:
            audio: `(N, d)`, audio embeddings; normalised here.
            text: `(N, d)`, text embeddings; row j of both is pair j.
            ids: N clip identifiers, integers or strings. Default: the row numbers.
            num_prototypes: M. More than N becomes N with a warning.
            prototype_pairing: How audio and text clusters become pairs, see
                `ask_lightning.knowledge.prototypes.build_prototypes`.
            normalize_prototypes: Bring the max-pooled prototypes back to unit length.
            index: `"auto"`, `"exact"` or a Faiss factory string, see
                `ask_lightning.knowledge.search.build_search`. Prototypes are always searched exactly.
            seed: Of K-means.

        Returns:
            The base, float32 (float64 for float64 embeddings), on the device of `audio`.

        Raises:
            ValueError: Shapes that are not two equal `(N, d)`, no rows, NaN or Inf (with the rows), ids
                of another number, an unknown pairing.
        """
        _check_pairs(audio, text)
        if prototype_pairing not in PAIRINGS:
            raise ValueError(
                f"Argument `prototype_pairing` has to be one of {PAIRINGS}, but got {prototype_pairing!r}."
            )
        if num_prototypes < 1:
            raise ValueError(f"Argument `num_prototypes` has to be at least 1, but got {num_prototypes}.")
        row_ids = torch.arange(len(audio)) if ids is None else integer_ids(ids)
        if row_ids.shape != (len(audio),):
            raise ValueError(
                f"Argument `ids` has to hold one id for each of the {len(audio)} pairs, "
                f"but got {tuple(row_ids.shape)}."
            )
        if num_prototypes > len(audio):
            warn(
                f"There are fewer pairs ({len(audio)}) than prototypes asked for ({num_prototypes}): "
                f"`num_prototypes` becomes {len(audio)}.",
                stacklevel=2,
            )
            num_prototypes = len(audio)
        dtype = torch.float64 if audio.dtype == torch.float64 else torch.float32
        audio, text = (unit_length(side.detach().to(dtype)) for side in (audio, text))
        fine = Granularity(audio, text.to(audio.device), index)
        if index not in ("auto", "exact"):
            _ = fine.search_audio, fine.search_text  # an index string that cannot work fails now
        prototypes = build_prototypes(
            fine.audio,
            fine.text,
            num_prototypes,
            pairing=prototype_pairing,
            normalize=normalize_prototypes,
            seed=seed,
        )
        return cls(fine, Granularity(*prototypes), row_ids.to(audio.device))

    def lookup(
        self,
        audio: Tensor,
        text: Tensor,
        k: int,
        *,
        exclude_ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        granularities: Iterable[GranularityName] = GRANULARITIES,
    ) -> dict[GranularityName, Neighborhood]:
        """Retrieve each query's nearest rows by its own modality, without gradient.

        Args:
            audio: `(B, d)`, unit vectors.
            text: `(B, d)`, unit vectors.
            k: K in [1, N], neighbours per query. Fewer prototypes than K give all prototypes.
            exclude_ids: B clip identifiers; fine rows of query i's own clip are left out. Prototypes mix
                clips and are not excluded.
            granularities: Which to look up.

        Returns:
            A `Neighborhood` for each granularity, rows ordered by (-score, row), in the base's dtype.

        Raises:
            ValueError: K is out of range, the queries have another width than the base or lie elsewhere, or
                `exclude_ids` are of another number.
        """
        self._check_lookup(audio, text, k, exclude=exclude_ids is not None)
        hidden = None if exclude_ids is None else integer_ids(exclude_ids, name="exclude_ids")
        if hidden is not None and hidden.shape != (len(audio),):
            raise ValueError(
                f"Argument `exclude_ids` has to hold one id for each of the {len(audio)} queries, "
                f"but got {tuple(hidden.shape)}."
            )
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            found = {}
            for name in granularities:
                side: Granularity = getattr(self, name)
                own = hidden if name == "fine" else None
                rows = (
                    self._nearest(side.search_audio, audio, min(k, len(side)), own),
                    self._nearest(side.search_text, text, min(k, len(side)), own),
                )
                found[name] = side.neighborhood(*rows)
            return found

    def _nearest(self, search: Search, queries: Tensor, k: int, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            return search(queries, k)[1]
        # However many rows of its own clip a query meets, k others are among the first k + that many.
        _, rows = search(queries, k + self._rows_per_id)  # (B, k + most)
        own = self.ids[rows] == hidden.to(rows.device)[:, None]  # (B, k + most)
        others_first = own.int().argsort(dim=1, stable=True)[:, :k]
        return rows.gather(1, others_first)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two bases share only if all their numbers are the same."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in self._tensors().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "fine_audio": self.fine.audio,
            "fine_text": self.fine.text,
            "coarse_audio": self.coarse.audio,
            "coarse_text": self.coarse.text,
            "ids": self.ids,
        }

    @cached_property
    def _rows_per_id(self) -> int:
        """The largest number of rows that one clip has."""
        return int(self.ids.unique(return_counts=True)[1].max())

    def _check_lookup(self, audio: Tensor, text: Tensor, k: int, *, exclude: bool) -> None:
        if audio.shape[-1] != self.width or text.shape[-1] != self.width:
            raise ValueError(
                f"The knowledge base holds embeddings of width {self.width}, but was asked with audio "
                f"{tuple(audio.shape)} and text {tuple(text.shape)}. Refresh it with the present encoders."
            )
        if audio.device != self.device:
            raise ValueError(
                f"The knowledge base lies on {self.device}, but was asked from {audio.device}. "
                f'Move it once: `knowledge = knowledge.to("{audio.device}")`.'
            )
        most = len(self.fine) - (self._rows_per_id if exclude else 0)
        if not 1 <= k <= most:
            raise ValueError(
                f"Argument `num_neighbors` has to be in [1, {most}] for a knowledge base of "
                f"{len(self.fine)} pairs{' without those of the own clip' if exclude else ''}, but got {k}. "
                "Lower it or use a larger knowledge source."
            )

    def to(self, device: torch.device | str) -> KnowledgeBase:
        """This base on another device; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        fine, coarse = (
            Granularity(side.audio.to(device), side.text.to(device), side.index)
            for side in (self.fine, self.coarse)
        )
        return type(self)(fine, coarse, self.ids.to(device))

    def save(self, path: str | Path) -> None:
        """Write the base as one safetensors file, whole or not at all.

        Args:
            path: The file. Indexes are not stored; they are rebuilt from the embeddings.

        Raises:
            OSError: It cannot be written; a file that was there is untouched.
        """
        write_snapshot(Path(path), self._tensors(), {"index": self.fine.index})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> KnowledgeBase:
        """Read a base written by `save`.

        Args:
            path: The file.
            device: Where the base shall lie.

        Raises:
            SnapshotError: The file is missing, damaged or of another format.
        """
        tensors, settings = read_snapshot(Path(path))
        try:
            fine = Granularity(tensors["fine_audio"], tensors["fine_text"], str(settings["index"]))
            coarse = Granularity(tensors["coarse_audio"], tensors["coarse_text"])
            return cls(fine, coarse, tensors["ids"]).to(device)
        except KeyError as error:
            raise SnapshotError(f"The knowledge snapshot {path} lacks {error}.") from error


def _check_pairs(audio: Tensor, text: Tensor) -> None:
    if audio.ndim != 2 or audio.shape != text.shape:
        raise ValueError(
            "Arguments `audio` and `text` have to be of the same shape (pairs, width), "
            f"but got {tuple(audio.shape)} and {tuple(text.shape)}."
        )
    if len(audio) == 0:
        raise ValueError("The knowledge source is empty: it yielded no audio–text pair.")
    for name, side in (("audio", audio), ("text", text)):
        broken = (~side.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            shown = ", ".join(map(str, broken[:_ROWS_NAMED_IN_AN_ERROR]))
            raise ValueError(
                f"The {name} embeddings of {len(broken)} of {len(side)} source rows contain NaN or Inf "
                f"(rows {shown}{', …' if len(broken) > _ROWS_NAMED_IN_AN_ERROR else ''}). "
                "Check these items of the knowledge source and the encoder's numerical range."
            )
        zero = int((side == 0).all(dim=1).sum())
        if zero:
            warn(
                f"The {name} embeddings of {zero} of {len(side)} source rows are all zero; they stay zero "
                "and are similar to nothing.",
                stacklevel=3,  # the caller of `from_embeddings`
            )
