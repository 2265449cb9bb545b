"""`BaseBuilder`: from the embeddings of a source to a knowledge base. Axes: `n` rows of a rank, `d` width."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ask_lightning.callbacks.knowledge_files import mix_files
from ask_lightning.encoding.encode import Encoded
from ask_lightning.functional import unit_length
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.base_settings import PLACEMENTS, STORAGES, BaseSettings, Placement, Storage
from ask_lightning.knowledge.embedding_checks import check_embeddings
from ask_lightning.knowledge.kmeans import CLUSTERINGS, Clustering
from ask_lightning.knowledge.prototypes import PAIRINGS, PrototypePairing
from ask_lightning.knowledge.refinement import GraphRefinement
from ask_lightning.knowledge.row_matching import agree
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.stored_clips import StoredClips
from ask_lightning.utilities.arguments import check_choice, check_count, check_fraction


@dataclass(frozen=True)
class BaseBuilder:
    """Makes knowledge bases by the options of `KnowledgeRefreshCallback`, which describes them.

    Raises:
        ValueError: An option is out of its range.
    """

    num_prototypes: int
    prototype_pairing: PrototypePairing
    normalize_prototypes: bool
    clustering: Clustering
    index: str
    placement: Placement
    storage: Storage
    momentum: float
    refine: GraphRefinement | None
    seed: int

    def __post_init__(self) -> None:
        check_count("num_prototypes", self.num_prototypes, 1)
        check_choice("prototype_pairing", self.prototype_pairing, PAIRINGS)
        check_choice("clustering", self.clustering, CLUSTERINGS)
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("storage", self.storage, STORAGES)
        check_fraction("momentum", self.momentum)

    def of_source(
        self,
        encoded: Encoded,
        training_clips: StoredClips | None,
        old: KnowledgeBase | None,
        *,
        is_same_source: bool,
        needs_prototypes: bool,
        directory: Path | None,
        device: torch.device,
    ) -> KnowledgeBase:
        """The base of a whole source; collective.

        Args:
            encoded: The source's embeddings, in memory or in files.
            training_clips: The training clips beside a source of other pairs.
            old: The base in use.
            is_same_source: Whether the embeddings are of the dataset of the old ones, which decides where
                there are no ids.
            needs_prototypes: Whether the loss looks prototypes up.
            directory: Where the files are.
            device: Where queries will be.
        """
        mixes = old is not None and self._mixes_with(old, encoded, is_same_source=is_same_source)
        if encoded.files is not None:
            assert directory is not None
            files = encoded.files
            if old is not None and mixes:
                files = mix_files(files, old, encoded.shard, directory, self._mix)
            return KnowledgeBase.from_files(
                files,
                directory,
                self._settings(needs_prototypes),
                ids=encoded.ids,
                caption_ids=encoded.caption_ids,
                shard=encoded.shard,
                training_clips=training_clips,
                previous=old,
                device=device,
            )
        audio, text = encoded.audio, encoded.text
        if old is not None and mixes:
            stored = old.fine.pairs(encoded.shard.global_rows().to(old.device))
            audio, text = (self._mix(before, now) for before, now in zip(stored, (audio, text), strict=True))
        if self.refine is not None:
            check_embeddings(audio, text, encoded.shard)
            audio, text = self.refine(audio, text, encoded.shard)
        return self.of_rows(
            audio,
            text,
            encoded.ids,
            encoded.caption_ids,
            encoded.shard,
            training_clips,
            old,
            needs_prototypes=needs_prototypes,
        )

    def of_rows(
        self,
        audio: Tensor,
        text: Tensor,
        ids: Tensor | None,
        caption_ids: Tensor | None,
        shard: RowShard,
        training_clips: StoredClips | None,
        old: KnowledgeBase | None,
        *,
        needs_prototypes: bool,
    ) -> KnowledgeBase:
        """The base of this rank's rows, with prototypes; collective.

        Args:
            audio: `(n, d)`.
            text: `(n, d)`.
            ids: `(n,)` clip ids; `None` if there are none.
            caption_ids: `(n,)` caption ids; `None` if there are none.
            shard: Where the rows are in the whole source.
            training_clips: The training clips beside a source of other pairs.
            old: The base in use.
            needs_prototypes: Whether the loss looks prototypes up.
        """
        return KnowledgeBase.from_embeddings(
            audio,
            text,
            ids=ids,
            caption_ids=caption_ids,
            storage=self.storage,
            shard=shard,
            training_clips=training_clips,
            previous=old,
            **asdict(self._settings(needs_prototypes)),
        )

    def training_clips(self, encoded: Encoded, old: KnowledgeBase | None) -> StoredClips:
        """The training clips, encoded beside a source of other pairs; held by every rank.

        Args:
            encoded: Their embeddings, with ids.
            old: The base in use.
        """
        audio, text = encoded.audio, encoded.text
        check_embeddings(audio, text, encoded.shard)
        assert encoded.ids is not None
        if self.refine is not None:
            audio, text = self.refine(audio, text, encoded.shard)
        audio, text = (encoded.shard.gather(unit_length(side)) for side in (audio, text))
        clips = StoredClips.of_rows(audio, text, encoded.shard.gather(encoded.ids.to(audio.device)))
        if old is None or old.training_clips is None or not self.momentum:
            return clips
        return clips.blend(old.training_clips, self.momentum)

    def describe(self) -> dict[str, Any]:
        """The options that the content of a base depends on."""
        names = ("num_prototypes", "prototype_pairing", "normalize_prototypes", "clustering", "index")
        described = {name: getattr(self, name) for name in (*names, "storage", "momentum", "seed")}
        return described | {"refine": None if self.refine is None else asdict(self.refine)}

    def _settings(self, needs_prototypes: bool) -> BaseSettings:
        """How a base is built, whether its rows are in memory or in files."""
        return BaseSettings(
            self.num_prototypes if needs_prototypes else 0,
            self.prototype_pairing,
            self.normalize_prototypes,
            self.clustering,
            self.index,
            self.seed,
            self.placement,
        )

    def _mix(self, before: Tensor, now: Tensor) -> Tensor:
        """Stored embeddings `(n, d)` and the new ones of the same rows, mixed by the momentum."""
        return self.momentum * before.to(now) + (1 - self.momentum) * unit_length(now)

    def _mixes_with(self, old: KnowledgeBase, encoded: Encoded, *, is_same_source: bool) -> bool:
        """Whether a momentum mixes new embeddings with old ones, which have to be of the same rows."""
        if not self.momentum:
            return False
        same_rows = len(old.fine) == encoded.shard.num_rows and old.width == encoded.audio.shape[1]
        advice = (
            "If it is a new dataset of the same pairs, pass their clip ids, by which they are known again: "
            "ASKModule(..., ids=...)."
        )
        if encoded.ids is None:
            same_rows = same_rows and is_same_source
        elif same_rows:
            ids = encoded.shard.gather(encoded.ids.to(old.device))
            same_rows = torch.equal(ids, old.ids)
            if same_rows and encoded.caption_ids is not None:
                captions = encoded.shard.gather(encoded.caption_ids.to(old.device))
                same_rows = agree(captions, old.caption_ids)
                advice = (
                    "Its clips are the same, but their captions are not. If it draws a caption at each "
                    "reading, pass a source with all captions, or leave `caption_ids` out."
                )
        if not same_rows:
            rank_zero_warn(
                f"The knowledge source changed since the last refresh ({len(old.fine)} pairs then, "
                f"{encoded.shard.num_rows} now), so this refresh stores the new embeddings only. {advice}"
            )
        return bool(same_rows)
