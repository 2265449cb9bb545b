"""What the knowledge has stored of whole clips.

Axes: `C` clips, `n` rows, `B` batch, `m` rows of a clip, `d` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.pairs import PairStore
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.dtypes import computation_dtype


@dataclass(frozen=True)
class ClipVectors:
    """Stored embeddings of the clips of a batch.

    Attributes:
        audio: `(B, d)`, the unit mean of each clip's audio rows; zero for a clip that is not stored.
        text: `(B, d)`, the same of its text rows, over all its captions.
        known: `(B,)` boolean, whether the clip is stored.
    """

    audio: Tensor
    text: Tensor
    known: Tensor


@dataclass(frozen=True)
class StoredClips:
    """Sums of rows by clip, of the rows that this rank holds.

    Attributes:
        ids: `(C,)` int64, ascending.
        sums: `(C, 2 d)`, the sum of each clip's audio rows beside that of its text rows.
        ranks: The processes over which the rows are spread; looking up is collective if there are several.

    Examples:
        >>> ids, rows = torch.tensor([7, 3, 7]), torch.eye(3)
        >>> stored = StoredClips.of_rows(rows, rows, ids)
        >>> stored.find(torch.tensor([7, 4])).audio
        tensor([[0.7071, 0.0000, 0.7071],
                [0.0000, 0.0000, 0.0000]])
    """

    ids: Tensor
    sums: Tensor
    ranks: Ranks

    @classmethod
    def of_rows(cls, audio: Tensor, text: Tensor, ids: Tensor, ranks: Ranks | None = None) -> StoredClips:
        """Add up the rows of each clip.

        Args:
            audio: `(n, d)`, the audio rows that this rank holds.
            text: `(n, d)`, the text rows; row j of both is pair j.
            ids: `(n,)` int64, the clip of each row.
            ranks: The processes that hold the rows together; default this one alone.

        Returns:
            The clips of these rows, on the device of `audio`.
        """
        unique, clip_of = ids.to(audio.device).unique(return_inverse=True)
        dtype = computation_dtype(audio)
        sums = torch.zeros(len(unique), 2 * audio.shape[1], dtype=dtype, device=audio.device)
        sums.index_add_(0, clip_of, torch.cat([audio, text], dim=1).to(dtype))
        return cls(unique, sums, ranks or Ranks())

    def renew(self, audio: Tensor, text: Tensor, ids: Tensor, changed: Tensor) -> None:
        """Add up the rows of some clips anew, in place, after these have changed.

        Args:
            audio: `(n, d)`, the audio rows that this rank holds, as `of_rows` took them.
            text: `(n, d)`, the text rows.
            ids: `(n,)` int64, the clip of each row.
            changed: Clips with other rows than before, of any number; those without rows here are left out.
        """
        ids = ids.to(audio.device)
        rows = torch.isin(ids, changed.to(ids.device)).nonzero().flatten()
        place = torch.searchsorted(self.ids, ids[rows])
        self.sums[place] = 0
        # In the order of `of_rows`, so that sums come out the same, to the bit on a CPU.
        self.sums.index_add_(0, place, torch.cat([audio[rows], text[rows]], dim=1).to(self.sums.dtype))

    def find(self, ids: Tensor) -> ClipVectors:
        """Look clips up by id; collective if several ranks hold the rows.

        Args:
            ids: `(B,)` int64, the clips; their number may differ between ranks.

        Returns:
            The unit mean of each clip's rows.
        """
        if self.ranks.size == 1:
            sums, known = self._local(ids)
        else:
            everyone = self.ranks.all_gather(ids)
            sums, known = self._local(torch.cat(everyone))
            sums, known = self.ranks.sum(sums), self.ranks.sum(known.long()) > 0
            start = sum(len(part) for part in everyone[: self.ranks.rank])
            sums, known = (side[start : start + len(ids)] for side in (sums, known))
        audio, text = sums.chunk(2, dim=1)
        return ClipVectors(unit_length(audio), unit_length(text), known)

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of this rank's rows of each clip, `(B, 2 d)`, and whether it has any, `(B,)`."""
        if len(self.ids) == 0:
            return self.sums.new_zeros(len(ids), self.sums.shape[1]), torch.zeros_like(ids, dtype=torch.bool)
        place = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        known = self.ids[place] == ids
        return self.sums[place] * known[:, None], known

    def blend(self, older: StoredClips, momentum: float) -> StoredClips:
        """Move each clip's embeddings only a part of the way from the older ones.

        Args:
            older: Clips that were stored before, by older encoders.
            momentum: m in [0, 1), the share of the older embeddings: unit(m · old + (1 - m) · new).

        Returns:
            The clips of this object; those that were not stored before stay as they are.
        """
        before = older.find(self.ids)
        stored = torch.cat([before.audio, before.text], dim=1)  # (C, 2 d)
        now = torch.cat([unit_length(side) for side in self.sums.chunk(2, dim=1)], dim=1)
        blended = torch.where(before.known[:, None], momentum * stored + (1 - momentum) * now, now)
        return StoredClips(self.ids, blended, self.ranks)

    def to(self, device: torch.device | str) -> StoredClips:
        """The same clips on another device."""
        return StoredClips(self.ids.to(device), self.sums.to(device), self.ranks)


def mean_of_rows(pairs: PairStore, rows: Tensor) -> ClipVectors:
    """The embeddings of clips whose rows are known, read when they are asked for; collective as `pairs` is.

    Args:
        pairs: The pairs.
        rows: `(B, m)` int64, the rows of each clip, -1 where it has fewer, or none.

    Returns:
        The unit mean of each clip's rows.

    Examples:
        >>> from ask_lightning.knowledge.pairs import StoredPairs
        >>> pairs = StoredPairs(torch.eye(3), torch.eye(3))
        >>> mean_of_rows(pairs, torch.tensor([[0, 2], [-1, -1]])).audio
        tensor([[0.7071, 0.0000, 0.7071],
                [0.0000, 0.0000, 0.0000]])
    """
    is_row = rows >= 0
    audio, text = (
        unit_length((side.float() * is_row[:, :, None]).sum(dim=1)) for side in pairs.pairs(rows.clamp(min=0))
    )
    return ClipVectors(audio, text, is_row.any(dim=1))
