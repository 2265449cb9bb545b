"""The knowledge base: what is remembered of all source pairs, and how a batch looks it up.

Axes: `B` batch, `K` neighbours, `N` pairs, `n` pairs of this rank, `M` prototypes, `d` width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args
from warnings import warn

import torch
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.pairs import Granularity, Neighborhood, SpreadGranularity, with_known
from ask_lightning.knowledge.prototypes import PAIRINGS, PrototypePairing, build_prototypes
from ask_lightning.knowledge.row_shard import Part
from ask_lightning.knowledge.search import Search
from ask_lightning.knowledge.snapshot_file import (
    SnapshotError,
    part_path,
    read_snapshot,
    snapshot_files,
    write_snapshot,
)
from ask_lightning.utilities.arguments import check_choice
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks

GranularityName = Literal["fine", "coarse"]
Placement = Literal["replicated", "sharded"]
Storage = Literal["float32", "float16", "bfloat16"]
GRANULARITIES: tuple[GranularityName, ...] = ("fine", "coarse")
PLACEMENTS: tuple[str, ...] = get_args(Placement)
STORAGES: tuple[str, ...] = get_args(Storage)

_ROWS_NAMED_IN_AN_ERROR = 5
# Tensors of a snapshot of which each file may hold a part, and those that are in the first one only.
_SIDES, _SHARED = ("fine_audio", "fine_text"), ("coarse_audio", "coarse_text", "ids")


class KnowledgeBase:
    """All source pairs (fine) and their prototypes (coarse), ready to be looked up.

    Immutable: a refresh makes a new one. Made by `from_embeddings` or `load`.

    Attributes:
        fine: The pairs, Eq. 7.
        coarse: The prototypes, Eq. 8.
        ids: `(N,)` int64, the clip that each pair belongs to; a clip may have several pairs.

    Examples:
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

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the pairs; then looking up and saving are collective."""
        return isinstance(self.fine, SpreadGranularity)

    @property
    def num_bytes(self) -> int:
        """Memory that the embeddings take on this rank, indexes not counted."""
        sides = (self.fine.audio, self.fine.text, self.coarse.audio, self.coarse.text)
        return sum(side.nbytes for side in sides)

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
        storage: Storage = "float32",
        placement: Placement = "replicated",
        part: Part | None = None,
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
                `ask_lightning.knowledge.search.build_search`. Prototypes are always searched exactly. On
                several ranks `"auto"` is `"exact"`.
            seed: Of K-means.
            storage: What the embeddings are kept in; half precision halves the memory. Scores are float32 in
                any case.
            placement: `"replicated"`: every rank holds all pairs. `"sharded"`: every rank holds its part,
                looks through it for the queries of all ranks, and fetches what it needs from the others.
                Prototypes are replicated.
            part: Which of the N pairs these are, where each rank passes its own; then this is collective.
                Default: all of them.

        Returns:
            The base, on the device of `audio`, float32 unless `storage` says otherwise (float64 for
            float64 embeddings).

        Raises:
            ValueError: Shapes that are not two equal `(N, d)`, no rows, NaN or Inf (with the rows), ids
                of another number, an unknown pairing, storage or placement.
        """
        part = part or Part.dealt(audio.shape[0] if audio.ndim else 0, Ranks())
        for name, value, allowed in (
            ("prototype_pairing", prototype_pairing, PAIRINGS),
            ("storage", storage, STORAGES),
            ("placement", placement, PLACEMENTS),
        ):
            check_choice(name, value, allowed)
        if num_prototypes < 1:
            raise ValueError(f"Argument `num_prototypes` has to be at least 1, but got {num_prototypes}.")
        _check_pairs(audio, text, part)
        row_ids = part.rows() if ids is None else integer_ids(ids)
        if row_ids.shape != (len(audio),):
            raise ValueError(
                f"Argument `ids` has to hold one id for each of the {len(audio)} pairs, "
                f"but got {tuple(row_ids.shape)}."
            )
        if num_prototypes > part.total:
            if part.ranks.rank == 0:
                warn(
                    f"There are fewer pairs ({part.total}) than prototypes asked for ({num_prototypes}): "
                    f"`num_prototypes` becomes {part.total}.",
                    stacklevel=2,
                )
            num_prototypes = part.total
        dtype = torch.float64 if audio.dtype == torch.float64 else torch.float32
        audio, text = (unit_length(side.detach().to(dtype)) for side in (audio, text.to(audio.device)))
        prototypes = build_prototypes(
            audio,
            text,
            num_prototypes,
            pairing=prototype_pairing,
            normalize=normalize_prototypes,
            seed=seed,
            part=part,
        )
        kept = getattr(torch, storage) if storage != "float32" else dtype
        audio, text, coarse_audio, coarse_text = (side.to(kept) for side in (audio, text, *prototypes))
        if index == "auto" and part.ranks.size > 1:
            index = "exact"  # whose scores, unlike Faiss's, do not depend on who searches how many rows
        if placement == "sharded" and part.ranks.size > 1:
            fine: Granularity = SpreadGranularity(audio, text, index, part)
        else:
            fine = Granularity(part.whole(audio), part.whole(text), index)
        if index not in ("auto", "exact"):
            with part.ranks.all_or_none("building its index"):
                _ = fine.search_audio, fine.search_text  # an index string that cannot work fails now
        base = cls(fine, Granularity(coarse_audio, coarse_text), part.whole(row_ids.to(audio.device)))
        if part.ranks.size > 1:
            part.ranks.require_equal(base.fingerprint, "the knowledge base")
        return base

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
        # Each with a factor of its own: audio and text may not change places.
        sums = enumerate(self._checksums.values())
        return f"{sum((2 * place + 1) * value for place, value in sums) % 2**64:016x}"

    @cached_property
    def _checksums(self) -> dict[str, int]:
        """Of all rows, whoever holds them, by the names of `_tensors`."""
        sums = (*self.fine.checksums, *self.coarse.checksums, checksum(self.ids))
        return dict(zip((*_SIDES, *_SHARED), sums, strict=True))

    def _tensors(self) -> dict[str, Tensor]:
        """All that this rank holds."""
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

    def has_rows_of(self, other: KnowledgeBase) -> bool:
        """Whether row j of both can be the same pair, on every rank."""
        same_parts = getattr(self.fine, "part", None) == getattr(other.fine, "part", None)
        return same_parts and self.fine.audio.shape == other.fine.audio.shape

    def to(self, device: torch.device | str) -> KnowledgeBase:
        """This base on another device; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        moved = type(self)(self.fine.to(device), self.coarse.to(device), self.ids.to(device))
        return with_known(moved, self, "fingerprint", "_checksums", "_rows_per_id")

    def save(self, path: str | Path) -> list[Path]:
        """Write the base as a safetensors file, whole or not at all.

        A sharded base is written as one file for each rank, `NAME.part-0-of-2.safetensors` and so on, by
        all ranks at once.

        Args:
            path: The file. Indexes are not stored; they are rebuilt from the embeddings.

        Returns:
            The files, this rank's or all others' as well.

        Raises:
            OSError: It cannot be written; a file that was there is untouched.
        """
        about = {"index": self.fine.index}
        tensors = self._tensors()
        if not isinstance(self.fine, SpreadGranularity):
            write_snapshot(Path(path), tensors, about, self._checksums)
            return [Path(path)]
        part = self.fine.part
        files = [part_path(Path(path), rank, part.ranks.size) for rank in range(part.ranks.size)]
        if part.ranks.rank > 0:
            tensors = {name: tensor for name, tensor in tensors.items() if name in _SIDES}
        write_snapshot(files[part.ranks.rank], tensors | {"rows": part.rows()}, about)
        return files

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str = "cpu", ranks: Ranks | None = None
    ) -> KnowledgeBase:
        """Read a base written by `save`, by however many ranks.

        Args:
            path: The file that was passed to `save`.
            device: Where the base shall lie.
            ranks: The processes over which it shall be spread (collective); default: this one holds all of
                it.

        Raises:
            SnapshotError: The file is missing, damaged or of another format.
        """
        files = _complete(Path(path))
        part, index = Part.dealt(0, Ranks()), ""
        mine: dict[str, Tensor] = {}
        for number, file in enumerate(files):
            tensors, settings = read_snapshot(file)
            try:
                if number == 0:
                    mine = {name: tensors[name] for name in _SHARED}
                    part = Part.dealt(len(mine["ids"]), ranks or Ranks())
                    index = str(settings["index"])
                    if index == "auto" and Ranks.current().size > 1:
                        index = "exact"  # as on building: a base is the same wherever it comes from
                    count = part.counts[part.ranks.rank]
                    mine |= {name: tensors[name].new_empty(count, tensors[name].shape[1]) for name in _SIDES}
                rows = tensors["rows"] if len(files) > 1 else torch.arange(part.total)
                owner, local = part.locate(rows)
                own = owner == part.ranks.rank
                for name in _SIDES:
                    mine[name][local[own]] = tensors[name][own]
            except KeyError as error:
                raise SnapshotError(f"The knowledge snapshot {file} lacks {error}.") from error
        if part.ranks.size > 1:
            fine: Granularity = SpreadGranularity(mine["fine_audio"], mine["fine_text"], index, part)
        else:
            fine = Granularity(mine["fine_audio"], mine["fine_text"], index)
        coarse = Granularity(mine["coarse_audio"], mine["coarse_text"])
        return cls(fine, coarse, mine["ids"]).to(device)


def _complete(path: Path) -> list[Path]:
    """The file, or those of all ranks that wrote a sharded base."""
    found = snapshot_files(path)
    if not found:
        raise SnapshotError(f"There is no knowledge snapshot at {path}.")
    if found == [path]:
        return found
    missing: list[str] = []
    # Runs of different numbers of ranks may have written the same knowledge, not all of them to the end.
    for size in sorted({int(file.stem.rpartition("-")[2]) for file in found}):
        expected = [part_path(path, rank, size) for rank in range(size)]
        if not (absent := [file.name for file in expected if file not in found]):
            return expected
        missing += absent
    raise SnapshotError(f"The knowledge snapshot {path} lacks {', '.join(missing)}.")


def _check_pairs(audio: Tensor, text: Tensor, part: Part) -> None:
    shapes = (tuple(audio.shape), tuple(text.shape))
    everyone = part.ranks.all_gather_object(shapes)
    for one, other in everyone:
        if len(one) != 2 or one != other or one[1:] != everyone[0][0][1:]:
            raise ValueError(
                "Arguments `audio` and `text` have to be of the same shape (pairs, width), "
                f"but got {one} and {other}."
            )
    if part.total == 0:
        raise ValueError("The knowledge source is empty: it yielded no audio–text pair.")
    for name, side in (("audio", audio), ("text", text)):
        broken = (~side.isfinite().all(dim=1)).nonzero().flatten().cpu()
        zero = int((side == 0).all(dim=1).sum())
        reports = part.ranks.all_gather_object((part.numbers(broken).tolist(), zero))
        rows = sorted(row for numbers, _ in reports for row in numbers)
        if rows:
            shown = ", ".join(map(str, rows[:_ROWS_NAMED_IN_AN_ERROR]))
            raise ValueError(
                f"The {name} embeddings of {len(rows)} of {part.total} source rows contain NaN or Inf "
                f"(rows {shown}{', …' if len(rows) > _ROWS_NAMED_IN_AN_ERROR else ''}). "
                "Check these items of the knowledge source and the encoder's numerical range."
            )
        if part.ranks.rank == 0 and (zeros := sum(count for _, count in reports)):
            warn(
                f"The {name} embeddings of {zeros} of {part.total} source rows are all zero; they stay zero "
                "and are similar to nothing.",
                stacklevel=3,  # the caller of `from_embeddings`
            )
