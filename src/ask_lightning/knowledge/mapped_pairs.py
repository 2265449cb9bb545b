"""Stored pairs that lie in files, for knowledge larger than memory.

Axes: `B` batch, `K` neighbours, `C` candidates, `Q` queries, `N` pairs, `d` width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ask_lightning.knowledge.file_search import FileSearch
from ask_lightning.knowledge.pairs import (
    Learnt,
    PairStore,
    StoredPairs,
    are_bounded,
    copy_cached,
    forget_cached,
)
from ask_lightning.knowledge.row_files import PairFiles, copy_pairs
from ask_lightning.knowledge.row_shard import RowShard, ShardedRows


@dataclass(frozen=True, eq=False)
class MappedPairs(StoredPairs):
    """Pairs of which this process holds the indexes in memory and reads the rows from files.

    Attributes:
        audio: `(N, d)` float16 on the CPU, mapped from its file; only for reading.
        text: `(N, d)`, the same for the text.
        index: The kind of search, see `FileSearch`.
        files: The files.
        directory: Where files are written that take the place of these.
        on: The device of queries and results.
    """

    files: PairFiles = field(kw_only=True)
    directory: Path = field(kw_only=True)
    on: torch.device = field(kw_only=True, default=torch.device("cpu"))

    @classmethod
    def of_files(
        cls,
        files: PairFiles,
        index: str,
        directory: Path,
        *,
        learnt: Learnt = (None, None),
    ) -> MappedPairs:
        """The pairs that two files hold.

        Args:
            files: The files.
            index: The kind of search, see `FileSearch`.
            directory: Where files are written that take the place of these.
            learnt: What the indexes of an earlier base have learnt, audio and text.
        """
        return cls(files.audio.mapped, files.text.mapped, index, learnt, files=files, directory=directory)

    def __reduce__(self) -> tuple[type[StoredPairs], tuple[Tensor, Tensor, str]]:
        raise TypeError(
            'Knowledge of storage="memmap" belongs to the process that made its files and cannot be sent to '
            "others. Save it instead: `knowledge.save(path)`."
        )

    @property
    def local(self) -> MappedPairs:
        """These pairs."""
        return self

    @property
    def device(self) -> torch.device:
        """The device of queries and results."""
        return self.on

    @property
    def num_bytes(self) -> int:
        """Memory that the rows take: none, they are in files."""
        return 0

    @cached_property
    def search_audio(self) -> FileSearch:
        """The search over all audio rows."""
        return FileSearch(self.files.audio, self.index, self.earlier[0])

    @cached_property
    def search_text(self) -> FileSearch:
        """The search over all text rows."""
        return FileSearch(self.files.text, self.index, self.earlier[1])

    @cached_property
    def is_bounded(self) -> bool:
        """Whether no row is longer than one, up to rounding."""
        return all(are_bounded(block) for side in self.files.sides for _, block in side.blocks())

    @cached_property
    def checksums(self) -> tuple[int, int]:
        """The `checksum` of all audio and of all text rows."""
        return self.files.checksums()

    def checksums_of(self, numbers: Tensor) -> tuple[int, int]:
        """The `checksum` of the audio and of the text rows, under the numbers `(n,)` that they have."""
        return self.files.checksums(numbers)

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """The sum of the audio rows and that of the text rows, `(d,)` each."""
        sums = []
        for side in self.files.sides:
            total = torch.zeros(side.shape[1])
            for _, block in side.blocks():
                total += block.float().sum(dim=0)
            sums.append(total.to(self.on))
        return sums[0], sums[1]

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Audio and text `(..., d)` of the pairs with the numbers `rows` `(...)`."""
        rows = rows.cpu()
        return self.audio[rows].to(self.on), self.text[rows].to(self.on)

    def replace(self, rows: Tensor, audio: Tensor, text: Tensor) -> None:
        """Write new unit vectors over those of some pairs, into the files.

        Files that a snapshot shares are copied before, so that the snapshot stays as it is. The indexes keep
        what they know of the other rows, and look at those that have changed exactly, until these are many.

        Args:
            rows: `(n,)` int64 numbers of pairs, each once.
            audio: `(n, d)` unit vectors.
            text: `(n, d)` unit vectors.

        Raises:
            OSError: The files cannot be written.
        """
        if not self.files.may_be_changed:
            self._take_files(copy_pairs(self.files, self.directory))
        rows = rows.cpu()
        for side, values in zip(self.files.sides, (audio, text), strict=True):
            side.write(rows, values)
        for name in ("search_audio", "search_text"):
            if name in vars(self):
                vars(self)[name].note_changed(rows)
        forget_cached(self, "checksums", "sums")

    def _take_files(self, files: PairFiles) -> None:
        """Go on with copies of the files."""
        changed = {"files": files, "audio": files.audio.mapped, "text": files.text.mapped}
        for name, value in changed.items():
            object.__setattr__(self, name, value)  # the one change that these pairs allow
        for name, side in (("search_audio", files.audio), ("search_text", files.text)):
            if name in vars(self):
                vars(self)[name].file = side

    def drift_from(self, stored: PairStore, rows: Tensor) -> tuple[Tensor, Tensor]:
        """RDM (Eq. 4) of each modality against older embeddings of the same pairs, see `PairStore`."""
        audio, text = drift_of_terms(self.drift_terms(stored.local, *self.pairs(rows)))
        return audio, text

    def drift_terms(self, stored: StoredPairs, *queries: Tensor) -> Tensor:
        """What `drift_of_terms` makes the drift of; that of several shards is the sum over them.

        Args:
            stored: Older embeddings of the same pairs.
            queries: `(Q, d)` audio and text, unit vectors.

        Returns:
            `(2, Q, 3)` float64: for the audio and the text of each query the sums over all rows of exp s,
            exp s' and (s - s') exp s, with s its score with a row and s' with the older row.
        """
        terms = torch.zeros(2, len(queries[0]), 3, dtype=torch.float64)
        for place, file in enumerate(self.files.sides):
            own = queries[place].cpu().float()
            for first, block in file.blocks():
                older = (stored.audio, stored.text)[place][first : first + len(block)]
                # Scores of unit vectors are in [-1, 1], so their exponentials need no shift.
                now, before = (side.cpu().float() @ own.T for side in (block, older))  # (n, Q)
                weights = now.exp()
                parts = (weights, before.exp(), (now - before) * weights)
                terms[place] += torch.stack([part.sum(dim=0, dtype=torch.float64) for part in parts], dim=1)
        return terms.to(self.on)

    def astype(self, dtype: torch.dtype) -> StoredPairs:
        """Refused: the files are float16."""
        raise TypeError(f"Pairs in files are float16 and cannot become {dtype}.")

    def to(self, device: torch.device | str) -> MappedPairs:
        """The same pairs for queries on another device; the rows stay where they are."""
        moved = MappedPairs(
            self.audio,
            self.text,
            self.index,
            self.learnt,
            files=self.files,
            directory=self.directory,
            on=torch.device(device),
        )
        return copy_cached(moved, self, "search_audio", "search_text", "is_bounded", "checksums", "sums")

    def tables(self, shard: RowShard) -> tuple[ShardedRows, ShardedRows]:
        """The audio rows and the text rows as tables of which these are a shard."""
        audio, text = (ShardedRows(side.mapped, shard, side, self.on) for side in self.files.sides)
        return audio, text


def drift_of_terms(terms: Tensor) -> Tensor:
    """RDM (Eq. 4) of each modality from the sums of `MappedPairs.drift_terms`.

    Args:
        terms: `(2, Q, 3)`.

    Returns:
        `(2,)` float32, the drift of the audio and of the text.
    """
    now, before, difference = terms.unbind(dim=2)  # (2, Q)
    return (difference / now - now.log() + before.log()).mean(dim=1).float()
