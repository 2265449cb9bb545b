"""The knowledge base: the stored embeddings of all source pairs, and how a batch looks them up.

Axes: `B` batch, `K` neighbours, `N` pairs, `n` pairs of this rank, `M` prototypes, `d` width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.functional.negative_mining import repeated
from ask_lightning.knowledge.base_file import REPLICATED, SHARDED, BaseParts, read_base, write_base
from ask_lightning.knowledge.base_settings import STORAGES, BaseSettings, Placement, RowIds, Storage
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.embedding_checks import check_embeddings, check_rows, row_lengths
from ask_lightning.knowledge.exact_search import Search
from ask_lightning.knowledge.kmeans import Clustering
from ask_lightning.knowledge.mapped_pairs import MappedPairs
from ask_lightning.knowledge.pairs import (
    Neighborhood,
    PairStore,
    StoredPairs,
    copy_cached,
    forget_cached,
    read_neighborhood,
)
from ask_lightning.knowledge.prototypes import PrototypePairing, build_prototypes
from ask_lightning.knowledge.row_files import ROWS_PER_BLOCK, PairFiles, PairWriter
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.sharded_pairs import ShardedPairs
from ask_lightning.knowledge.stored_clips import ClipVectors, StoredClips, mean_of_rows
from ask_lightning.utilities.arguments import check_choice
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.non_finite import NonFiniteEmbeddingsError

GranularityName = Literal["fine", "coarse"]
GRANULARITIES: tuple[GranularityName, ...] = ("fine", "coarse")


class KnowledgeBase:
    """All source pairs (fine) and their prototypes (coarse), ready to be looked up.

    A refresh makes a new one; only `replace_rows` changes one in place. Made by `from_embeddings` or `load`.

    Attributes:
        fine: The pairs, Eq. 7.
        coarse: The prototypes, Eq. 8.
        ids: `(N,)` int64, the clip that each pair belongs to; a clip may have several pairs.
        training_clips: The training clips, where the pairs are those of another source; else `None`.
        caption_ids: `(N,)` int64, the caption of each pair, which with its clip says which pair it is; `None`
            where the captions have no ids.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 100, 16, generator=generator)
        >>> base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=8)
        >>> base
        KnowledgeBase(100 pairs, 8 prototypes, width 16, index='auto', cpu)
        >>> base.lookup(audio[:4], text[:4], k=3)["fine"].audio_rows.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        fine: PairStore,
        coarse: StoredPairs,
        ids: Tensor,
        training_clips: StoredClips | None = None,
        caption_ids: Tensor | None = None,
    ) -> None:
        self.fine = fine
        self.coarse = coarse
        self.ids = ids
        self.training_clips = training_clips
        self.caption_ids = caption_ids

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.fine)} pairs, {len(self.coarse)} prototypes, "
            f"width {self.width}, index={self.fine.index!r}, {self.device})"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> KnowledgeBase:
        # Copies of a model (weight averaging) look up the same knowledge, and must not double it.
        return self

    @property
    def width(self) -> int:
        """d, the width of the embeddings."""
        return self.fine.local.audio.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the base; queries have to be on it, too."""
        return self.fine.local.device

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a shard of the pairs; then looking up and saving are collective."""
        return self.fine.shard.ranks.size > 1

    @property
    def num_bytes(self) -> int:
        """Memory that the embeddings take on this rank, indexes not counted."""
        return self.fine.local.num_bytes + self.coarse.num_bytes

    @classmethod
    def from_embeddings(
        cls,
        audio: Tensor,
        text: Tensor,
        *,
        ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        caption_ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        num_prototypes: int = 512,
        prototype_pairing: PrototypePairing = "matched",
        normalize_prototypes: bool = True,
        clustering: Clustering = "spherical",
        index: str = "auto",
        seed: int = 0,
        storage: Storage = "float32",
        placement: Placement = "replicated",
        shard: RowShard | None = None,
        training_clips: StoredClips | None = None,
        directory: str | Path | None = None,
        previous: KnowledgeBase | None = None,
    ) -> KnowledgeBase:
        """Build the base from the embeddings of all source pairs.

        Args:
            audio: `(N, d)`, audio embeddings; normalised here.
            text: `(N, d)`, text embeddings; row j of both is pair j.
            ids: N clip identifiers, integers or strings. Default: the row numbers.
            caption_ids: N caption identifiers, integers or strings, unique at least within their clip, by
                which `rows_of_pairs` finds a pair. Default: captions of a clip are not told apart.
            num_prototypes: M, the number of prototypes. More than N becomes N with a warning. 0 makes a base
                whose coarse knowledge cannot be looked up.
            prototype_pairing: How audio and text clusters become pairs, see
                `ask_lightning.knowledge.prototypes.build_prototypes`.
            normalize_prototypes: Whether to bring the max-pooled prototypes back to unit length.
            clustering: The kind of K-means, `"spherical"` or `"euclidean"`, see
                `ask_lightning.knowledge.kmeans.kmeans`.
            index: `"auto"`, `"exact"` or a Faiss factory string, see
                `ask_lightning.knowledge.search.build_search`. Prototypes are always searched exactly. On
                several ranks `"auto"` is `"exact"`.
            seed: Seed of the K-means initialisation.
            storage: The dtype in which embeddings are kept; half precision halves the memory. Scores are
                float32 in any case. `"memmap"` keeps them in float16 files in `directory`, of which memory
                holds the index alone, see `ask_lightning.knowledge.file_search.FileSearch`.
            placement: `"replicated"`: every rank holds all pairs. `"sharded"`: every rank holds its shard,
                searches it for the queries of all ranks, and fetches what it needs from the others.
                Prototypes are replicated.
            shard: Which of the N pairs these are, if each rank passes its own; then this is collective.
                Default: all of them.
            training_clips: The training clips for `find_clips`, where the pairs are those of another source.
                Default: the clips of the pairs.
            directory: The directory for the files of `storage="memmap"`; they are removed with the base.
            previous: The base before this one. What its Faiss indexes have learnt is used again where it
                describes the new embeddings well.

        Returns:
            The base, on the device of `audio`, float32 unless `storage` says otherwise (float64 for
            float64 embeddings).

        Raises:
            ValueError: Shapes that are not two equal `(N, d)`, no rows, NaN or Inf (with the rows), ids
                of another number, caption ids without clip ids, an unknown pairing, clustering, storage or
                placement.
        """
        shard = shard or RowShard.unsharded(audio.shape[0] if audio.ndim else 0)
        check_choice("storage", storage, STORAGES)
        settings = BaseSettings(
            num_prototypes, prototype_pairing, normalize_prototypes, clustering, index, seed, placement
        )
        settings.check(shard, is_in_files=storage == "memmap")
        check_embeddings(audio, text, shard)
        row_ids = RowIds.of(ids, caption_ids, shard)
        learnt = (None, None) if previous is None else previous.fine.local.learnt
        if storage == "memmap":
            if directory is None:
                raise ValueError(
                    'Argument `directory` has to name a directory for the files of storage="memmap", '
                    "but got None."
                )
            with shard.ranks.all_or_none("writing its rows"):
                writer = PairWriter(Path(directory), len(audio))
                for sides in zip(audio.split(ROWS_PER_BLOCK), text.split(ROWS_PER_BLOCK), strict=True):
                    writer.append(*sides)
                files = writer.finish()
            local: StoredPairs = MappedPairs.of_files(files, index, Path(directory), learnt=learnt).to(
                audio.device
            )
            return cls._of_pairs(local, row_ids, shard, settings, training_clips)
        if index == "auto" and shard.ranks.size > 1:
            index = "exact"  # whose scores, unlike Faiss's, do not depend on who searches how many rows
        dtype = computation_dtype(audio)
        audio, text = (unit_length(side.detach().to(dtype)) for side in (audio, text.to(audio.device)))
        local = StoredPairs(audio, text, index, learnt)
        stored_dtype = getattr(torch, storage) if storage != "float32" else dtype
        return cls._of_pairs(local, row_ids, shard, settings, training_clips, stored_dtype)

    @classmethod
    def from_files(
        cls,
        files: PairFiles,
        directory: str | Path,
        settings: BaseSettings,
        *,
        ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        caption_ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        shard: RowShard | None = None,
        training_clips: StoredClips | None = None,
        previous: KnowledgeBase | None = None,
        device: torch.device | str = "cpu",
    ) -> KnowledgeBase:
        """Build the base of `storage="memmap"` from embeddings that are in files already.

        Args:
            files: The pairs, as `ask_lightning.knowledge.row_files.PairWriter` writes them.
            directory: The directory for files that take the place of these.
            settings: The options that `from_embeddings` takes one by one. The pairing cannot be `"joint"`;
                on several ranks the placement has to be `"sharded"`.
            ids: N clip identifiers, see `from_embeddings`.
            caption_ids: N caption identifiers, see `from_embeddings`.
            shard: Which of the N pairs these are, see `from_embeddings`.
            training_clips: The training clips, see `from_embeddings`.
            previous: The base before this one, see `from_embeddings`.
            device: The device of queries and results.

        Returns:
            The base.

        Raises:
            ValueError: As `from_embeddings`.
        """
        shard = shard or RowShard.unsharded(len(files.audio))
        settings.check(shard, is_in_files=True)
        learnt = (None, None) if previous is None else previous.fine.local.learnt
        local = MappedPairs.of_files(files, settings.index, Path(directory), learnt=learnt).to(device)
        check_rows(*local.tables(shard))
        return cls._of_pairs(local, RowIds.of(ids, caption_ids, shard), shard, settings, training_clips)

    @classmethod
    def _of_pairs(
        cls,
        local: StoredPairs,
        row_ids: RowIds,
        shard: RowShard,
        settings: BaseSettings,
        training_clips: StoredClips | None,
        stored_dtype: torch.dtype | None = None,
    ) -> KnowledgeBase:
        """Build the base from this rank's pairs; collective."""
        coarse = StoredPairs(local.coarse_like(), local.coarse_like())
        if num_prototypes := settings.limited_to(shard):
            coarse = build_prototypes(
                ShardedPairs(local, shard),
                num_prototypes,
                pairing=settings.prototype_pairing,
                normalize=settings.normalize_prototypes,
                clustering=settings.clustering,
                seed=settings.seed,
            )
        if stored_dtype is not None:
            local, coarse = local.astype(stored_dtype), coarse.astype(stored_dtype)
        sharded = ShardedPairs(local, shard)
        is_in_files = isinstance(local, MappedPairs)
        keeps_shards = settings.placement == "sharded" and shard.ranks.size > 1
        fine: PairStore = sharded if keeps_shards else local if is_in_files else sharded.replicated()
        if is_in_files or local.index not in ("auto", "exact"):
            with shard.ranks.all_or_none("building its index"):
                _ = fine.search_audio, fine.search_text  # an index string that cannot work fails now
        all_ids = shard.gather(row_ids.clips.to(local.device))
        captions = None if row_ids.captions is None else shard.gather(row_ids.captions.to(local.device))
        base = cls(fine, coarse.to(local.device), all_ids, training_clips, captions)
        if shard.ranks.size > 1:
            shard.ranks.require_equal(base.fingerprint, "the knowledge base")
        return base

    def prepare(self, granularities: Iterable[GranularityName] = (), *, clips: bool = False) -> None:
        """Make now, once, what lookups would make when they first need it; collective where rows are sharded.

        A first lookup then takes no longer than others, and a loss that `torch.compile` traces is one graph.

        Args:
            granularities: Names of the granularities whose indexes are made, and whose rows are measured.
            clips: Whether to add up the rows of clips for `find_clips`.
        """
        for name in granularities:
            pairs: PairStore = getattr(self, name)
            _ = pairs.search_audio, pairs.search_text, pairs.is_bounded, self._rows_per_id, self._num_ids
        if clips:
            self.find_clips(self.ids[:0])

    def lookup(
        self,
        audio: Tensor,
        text: Tensor,
        k: int | Mapping[GranularityName, int],
        *,
        exclude_ids: Tensor | Sequence[int] | Sequence[str] | None = None,
        distinct_clips: bool = False,
        granularities: Iterable[GranularityName] = GRANULARITIES,
    ) -> dict[GranularityName, Neighborhood]:
        """Retrieve each query's nearest rows by its own modality, without gradient.

        Args:
            audio: `(B, d)`, unit vectors.
            text: `(B, d)`, unit vectors.
            k: K in [1, N], neighbours per query, or a K for each granularity. Fewer prototypes than K give
                all prototypes.
            exclude_ids: B clip identifiers; fine rows of query i's own clip are left out. Prototypes mix
                clips and are not excluded.
            distinct_clips: Whether the fine rows of a query are of K different clips: of each clip only the
                row that comes first. Prototypes mix clips and are not concerned.
            granularities: Names of the granularities to look up.

        Returns:
            A `Neighborhood` for each granularity, rows ordered by (-score, row), in the base's dtype.

        Raises:
            ValueError: `k` is out of range, the queries have another width or device than the base, or
                `exclude_ids` does not hold B identifiers.
        """
        names = tuple(granularities)
        counts = {name: k if isinstance(k, int) else k[name] for name in names}
        self._check_lookup(audio, text, counts, exclude_ids is not None, distinct_clips)
        excluded = None if exclude_ids is None else integer_ids(exclude_ids, name="exclude_ids")
        if excluded is not None and excluded.shape != (len(audio),):
            raise ValueError(
                f"Argument `exclude_ids` has to hold one id for each of the {len(audio)} queries, "
                f"but got {tuple(excluded.shape)}."
            )
        with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
            found = {}
            for name, count in counts.items():
                pairs: PairStore = getattr(self, name)
                searches = (pairs.search_audio, audio), (pairs.search_text, text)
                if name == "fine" and (excluded is not None or distinct_clips):
                    audio_rows, text_rows = (
                        self._nearest_allowed(search, queries, count, excluded, distinct_clips)
                        for search, queries in searches
                    )
                else:
                    audio_rows, text_rows = (
                        search(queries, min(count, len(pairs)))[1] for search, queries in searches
                    )
                found[name] = read_neighborhood(pairs, audio_rows, text_rows)
            return found

    def rows_of_clips(self, ids: Tensor) -> Tensor:
        """The rows that clips have in the fine knowledge; not collective.

        Args:
            ids: `(B,)` int64 clip ids, see `integer_ids`.

        Returns:
            `(B, m)` int64 global row numbers, ascending, with m the largest number of rows that a clip of the
            base has; -1 where a clip has fewer rows, or none.

        Examples:
            >>> sides = torch.eye(3), torch.eye(3)
            >>> base = KnowledgeBase.from_embeddings(*sides, ids=[7, 4, 7], num_prototypes=1)
            >>> base.rows_of_clips(torch.tensor([7, 5]))
            tensor([[ 0,  2],
                    [-1, -1]])
        """
        ordered, order = self._rows_by_id
        ids = ids.to(ordered.device)
        first, behind = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
        places = first[:, None] + torch.arange(self._rows_per_id, device=ordered.device)  # (B, m)
        rows = order[places.clamp(max=len(order) - 1)]
        return torch.where(places < behind[:, None], rows, -1)

    def rows_of_pairs(self, ids: Tensor, caption_ids: Tensor) -> Tensor:
        """The row that each pair has in the fine knowledge, by its clip and its caption; not collective.

        Args:
            ids: `(B,)` int64 clip ids, see `integer_ids`.
            caption_ids: `(B,)` int64 caption ids, see `integer_ids`.

        Returns:
            `(B,)` int64 global row numbers; -1 for a pair that is not stored. Of a pair that is stored
            several times it is the first row.

        Raises:
            ValueError: The base has no caption ids.

        Examples:
            >>> base = KnowledgeBase.from_embeddings(
            ...     torch.eye(3), torch.eye(3), ids=[7, 4, 7], caption_ids=[0, 0, 1], num_prototypes=1
            ... )
            >>> base.rows_of_pairs(torch.tensor([7, 4]), torch.tensor([1, 1]))
            tensor([ 2, -1])
        """
        if self.caption_ids is None:
            raise ValueError(
                "The knowledge base has no caption ids. Build it with them: "
                "KnowledgeBase.from_embeddings(..., ids=..., caption_ids=...)."
            )
        rows = self.rows_of_clips(ids)  # (B, m)
        captions = self.caption_ids[rows.clamp(min=0)]  # (B, m)
        is_pair = (rows >= 0) & (captions == caption_ids.to(rows.device)[:, None])
        first = is_pair.int().argmax(dim=1, keepdim=True)
        return torch.where(is_pair, rows, -1).gather(1, first).squeeze(1)

    @torch.no_grad()
    def replace_rows(self, rows: Tensor, audio: Tensor, text: Tensor) -> None:
        """Write new embeddings over stored ones, in place; prototypes stay as they are.

        Searches follow at once: exact ones look at the rows themselves, an index of Faiss is filled anew at
        the next lookup, or, beside files, once many rows have changed. `training_clips`, which are of another
        source, stay as well.

        Args:
            rows: `(n,)` int64 global row numbers. Of a row that occurs several times the last one counts.
            audio: `(n, d)`, audio embeddings; normalised here.
            text: `(n, d)`, text embeddings; normalised here. Every rank passes the same of all three; on a
                sharded base each keeps the rows that it holds.

        Raises:
            ValueError: The embeddings are not two equal `(n, d)` of the base's width or contain NaN or Inf,
                or a row is not in [0, N). The base is as it was.

        Examples:
            >>> base = KnowledgeBase.from_embeddings(torch.eye(2), torch.eye(2), num_prototypes=1)
            >>> base.replace_rows(torch.tensor([1]), torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
            >>> base.fine.audio
            tensor([[1.0000, 0.0000],
                    [0.6000, 0.8000]])
        """
        if not tuple(audio.shape) == tuple(text.shape) == (len(rows), self.width):
            raise ValueError(
                f"Arguments `audio` and `text` have to be of shape {(len(rows), self.width)}, one embedding "
                f"of the base's width for each row, but got {tuple(audio.shape)} and {tuple(text.shape)}."
            )
        if len(rows) == 0:
            return
        if not 0 <= int(rows.min()) <= int(rows.max()) < len(self.fine):
            raise ValueError(
                f"Argument `rows` has to hold row numbers in [0, {len(self.fine)}), but got numbers from "
                f"{int(rows.min())} to {int(rows.max())}."
            )
        rows, audio, text = (given.to(self.device) for given in (rows, audio, text))
        broken = ~(row_lengths(audio).isfinite() & row_lengths(text).isfinite())
        if bool(broken.any()):
            raise NonFiniteEmbeddingsError(
                f"The embeddings of {int(broken.sum())} of the {len(rows)} rows to replace contain NaN or Inf"
                f" (the first is row {int(rows[broken][0])}). Leave these rows out."
            )
        rows, place = rows.unique(return_inverse=True)
        numbers = torch.arange(len(place), device=self.device)
        last = torch.zeros_like(rows).scatter_reduce(0, place, numbers, "amax", include_self=False)
        audio, text = (unit_length(side[last].to(computation_dtype(side))) for side in (audio, text))
        self.fine.replace(rows, audio, text)
        forget_cached(self, "fingerprint", "_checksums")
        if "_clips" in vars(self):
            local, shard = self.fine.local, self.fine.shard
            self._clips.renew(local.audio, local.text, shard.select(self.ids), self.ids[rows])

    @torch.no_grad()
    def find_clips(self, ids: Tensor) -> ClipVectors:
        """The stored embeddings of training clips as wholes, each the unit mean of the clip's rows.

        Args:
            ids: `(B,)` int64 clip ids, see `integer_ids`. On a sharded base this is collective, and the
                number of ids may differ between ranks.

        Returns:
            The embeddings, and which of the clips are stored.
        """
        ids = ids.to(self.device)
        if self.training_clips is not None:
            return self.training_clips.find(ids)
        if isinstance(self.fine.local, MappedPairs):  # whose sums by clip may be larger than memory
            return mean_of_rows(self.fine, self.rows_of_clips(ids))
        return self._clips.find(ids)

    @cached_property
    def _clips(self) -> StoredClips:
        """The clips of pairs that are in memory."""
        local, shard = self.fine.local, self.fine.shard
        return StoredClips.of_rows(local.audio, local.text, shard.select(self.ids), shard.ranks)

    def _nearest_allowed(
        self, search: Search, queries: Tensor, k: int, excluded: Tensor | None, distinct_clips: bool
    ) -> Tensor:
        """The K nearest fine rows of each query, `(B, K)`, without excluded clips and repeated ones."""
        # However many rows a clip has, those of k clips are among the first k times that many, and those of
        # other clips than the own are behind at most that many.
        wanted = k * (self._rows_per_id if distinct_clips else 1)
        wanted += self._rows_per_id if excluded is not None else 0
        _, rows = search(queries, min(wanted, len(self.fine)))  # (B, wanted)
        clips = self.ids[rows]  # (B, wanted)
        unwanted = repeated(clips) if distinct_clips else torch.zeros_like(clips, dtype=torch.bool)
        if excluded is not None:
            unwanted |= clips == excluded.to(clips.device)[:, None]
        allowed_first = unwanted.int().argsort(dim=1, stable=True)[:, :k]
        return rows.gather(1, allowed_first)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that two bases share only if all their numbers are the same."""
        # Each tensor has a factor of its own, so that audio and text cannot be swapped unnoticed.
        sums = enumerate(self._checksums.values())
        return f"{sum((2 * place + 1) * value for place, value in sums) % 2**64:016x}"

    @cached_property
    def _checksums(self) -> dict[str, int]:
        """The checksum of each tensor of a snapshot by name, over the rows of all ranks."""
        sums = (*self.fine.checksums, *self.coarse.checksums, checksum(self.ids))
        others = {name: checksum(tensor) for name, tensor in self._parts.optional_tensors().items()}
        return dict(zip((*SHARDED, *REPLICATED), sums, strict=True)) | others

    @property
    def _parts(self) -> BaseParts:
        """What a snapshot holds."""
        return BaseParts(self.fine, self.coarse, self.ids, self.training_clips, self.caption_ids)

    @cached_property
    def _rows_by_id(self) -> tuple[Tensor, Tensor]:
        """The ids in ascending order, and the row of each."""
        ordered, order = self.ids.sort(stable=True)
        return ordered, order

    @cached_property
    def _rows_per_id(self) -> int:
        """The largest number of rows that one clip has."""
        return int(self.ids.unique(return_counts=True)[1].max())

    @cached_property
    def _num_ids(self) -> int:
        """The number of clips that have pairs."""
        return len(self.ids.unique())

    def _check_lookup(
        self,
        audio: Tensor,
        text: Tensor,
        counts: Mapping[GranularityName, int],
        exclude: bool,
        distinct_clips: bool,
    ) -> None:
        """Refuse queries of another width or device, and K that the base cannot give."""
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
        self.check_num_neighbors(counts, exclude=exclude, distinct_clips=distinct_clips)

    def check_num_neighbors(
        self, counts: Mapping[GranularityName, int], *, exclude: bool, distinct_clips: bool = False
    ) -> None:
        """Refuse K that the base cannot give.

        Args:
            counts: K, the number of neighbours of a lookup, for each granularity.
            exclude: Whether lookups leave rows of the query's own clip out.
            distinct_clips: Whether the fine rows of a query are of different clips.

        Raises:
            ValueError: A K is not in [1, N]; for the fine rows, N counts those that are left, or their clips.
                Or the base has no prototypes to look up.
        """
        if "coarse" in counts and len(self.coarse) == 0:
            raise ValueError(
                "The knowledge base was built without prototypes, so its coarse knowledge cannot be looked "
                'up. Build it with `num_prototypes`, or look up `granularities=("fine",)`. A loss that looks '
                "prototypes up says so by its property `needs_prototypes`."
            )
        if distinct_clips:
            most_fine = self._num_ids - (1 if exclude else 0)
        else:
            most_fine = len(self.fine) - (self._rows_per_id if exclude else 0)
        for name, k in counts.items():
            most = most_fine if name == "fine" else len(self.fine)
            if not 1 <= k <= most:
                raise ValueError(
                    f"Argument `k` has to be in [1, {most}] for a knowledge base of {len(self.fine)} pairs"
                    f"{f' of {self._num_ids} distinct clips' if distinct_clips else ''}"
                    f"{' without those of the own clip' if exclude else ''}, but got {k}. Lower it (it is "
                    "`num_neighbors` of a loss) or use a larger knowledge source."
                )

    def has_same_rows_as(self, other: KnowledgeBase) -> bool:
        """Whether both bases have as many pairs of the same width, in the same shards on every rank."""
        return self.fine.shard == other.fine.shard and self.width == other.width

    def to(self, device: torch.device | str) -> KnowledgeBase:
        """Move the base to a device; the result is this base if it is there already."""
        if self.device == torch.device(device):
            return self
        clips = self.training_clips and self.training_clips.to(device)
        captions = None if self.caption_ids is None else self.caption_ids.to(device)
        moved = type(self)(self.fine.to(device), self.coarse.to(device), self.ids.to(device), clips, captions)
        return copy_cached(moved, self, "fingerprint", "_checksums", "_rows_per_id", "_num_ids")

    def save(self, path: str | Path) -> list[Path]:
        """Write the base as a safetensors file, whole or not at all.

        A sharded base is written as one file for each rank, `NAME.shard-0-of-2.safetensors` and so on, by
        all ranks at once.

        Args:
            path: The file. Indexes are not stored; they are rebuilt from the embeddings.

        Returns:
            All files of the snapshot; of a sharded base, those that the other ranks write as well.

        Raises:
            OSError: The file cannot be written; one that was there is untouched.
        """
        return write_base(Path(path), self._parts, {} if self.is_sharded else self._checksums)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
        directory: str | Path | None = None,
    ) -> KnowledgeBase:
        """Read a base written by `save`, by however many ranks.

        Args:
            path: The path that was passed to `save`.
            device: The device on which the base shall lie.
            ranks: The processes that shall hold one shard each (collective). Default: this process holds
                all pairs.
            directory: Where the rows of `storage="memmap"` are written if they have to be divided otherwise
                or are replaced. Default: the directory of the snapshot.

        Returns:
            The base.

        Raises:
            SnapshotError: A file is missing, damaged or of another format.
        """
        parts = read_base(Path(path), ranks, None if directory is None else Path(directory))
        return cls(parts.fine, parts.coarse, parts.ids, parts.training_clips, parts.caption_ids).to(device)
