"""A knowledge base on disk: what a snapshot holds, whether rows are in tensors or in files of their own.

A snapshot is a safetensors file, for a sharded base one for each rank. Pairs in tensors are among its
tensors. Pairs in files stay in files beside it, which are second names of those in use, not copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.faiss_search import TrainedIndex
from ask_lightning.knowledge.mapped_pairs import MappedPairs
from ask_lightning.knowledge.pairs import Learnt, PairStore, StoredPairs
from ask_lightning.knowledge.row_files import ROWS_PER_BLOCK, PairFiles, PairWriter, RowFileError, paths_of
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.sharded_pairs import ShardedPairs
from ask_lightning.knowledge.snapshot_file import (
    SnapshotError,
    find_complete_snapshot,
    read_snapshot,
    rows_stem,
    snapshot_paths,
    write_snapshot,
)
from ask_lightning.knowledge.stored_clips import StoredClips
from ask_lightning.utilities.distributed import Ranks

# Tensors of a snapshot that each shard file holds some rows of, and those that the first file alone holds.
SHARDED, REPLICATED = ("fine_audio", "fine_text"), ("coarse_audio", "coarse_text", "ids")
# Tensors of a snapshot with what its Faiss indexes have learnt; without, they would learn something else.
LEARNT = ("learnt_audio", "learnt_text")
# Tensors of a snapshot that its first file holds if the training clips are not those of the pairs.
CLIPS = ("clip_ids", "clip_sums")
# The tensor of a snapshot that its first file holds if the captions have ids.
CAPTIONS = "caption_ids"


@dataclass(frozen=True)
class BaseParts:
    """What a knowledge base is made of.

    Attributes:
        fine: The pairs.
        coarse: The prototypes.
        ids: `(N,)` int64, the clip of each pair.
        training_clips: The training clips, where the pairs are those of another source.
        caption_ids: `(N,)` int64, the caption of each pair, where that is known.
    """

    fine: PairStore
    coarse: StoredPairs
    ids: Tensor
    training_clips: StoredClips | None
    caption_ids: Tensor | None

    def optional_tensors(self) -> dict[str, Tensor]:
        """The tensors that not every base has, by their names in a snapshot."""
        found: dict[str, Tensor] = {}
        if self.training_clips is not None:
            found |= zip(CLIPS, (self.training_clips.ids, self.training_clips.sums), strict=True)
        if self.caption_ids is not None:
            found[CAPTIONS] = self.caption_ids
        return found


def write_base(path: Path, parts: BaseParts, checksums: Mapping[str, int]) -> list[Path]:
    """Write this rank's file of a snapshot, and the second names of its rows' files.

    Args:
        path: The path of the snapshot.
        parts: The base.
        checksums: The checksums of all tensors over all ranks; used where there is one rank.

    Returns:
        All files of the snapshot; of a sharded base, those that the other ranks write as well.

    Raises:
        OSError: A file cannot be written; what was there is untouched.
    """
    shard, local = parts.fine.shard, parts.fine.local
    ranks = shard.ranks
    paths = snapshot_paths(path, ranks.size)
    own = paths[ranks.rank]
    settings: dict[str, object] = {"index": parts.fine.index}
    tensors: dict[str, Tensor] = {}
    if isinstance(local, MappedPairs):
        local.files.link_to(rows_stem(own))
        settings["row_checksums"] = list(local.checksums_of(shard.global_rows()))
    else:
        tensors |= zip(SHARDED, (local.audio, local.text), strict=True)
    if ranks.rank == 0:
        tensors |= zip(REPLICATED, (parts.coarse.audio, parts.coarse.text, parts.ids), strict=True)
        tensors |= parts.optional_tensors()
    if ranks.size > 1:
        tensors["rows"] = shard.global_rows()
    learnt = dict(zip(LEARNT, local.learnt, strict=True))
    settings["learnt"] = {name: one.description for name, one in learnt.items() if one is not None}
    contents = {name: one.content_tensor for name, one in learnt.items() if one is not None}
    known = dict(checksums) | {name: checksum(content) for name, content in contents.items()}
    try:
        write_snapshot(own, tensors | contents, settings, None if ranks.size > 1 else known)
    except OSError:
        if not own.exists():  # rows without their snapshot are of no use
            for side in paths_of(rows_stem(own)):
                side.unlink(missing_ok=True)
        raise
    return paths


def read_base(path: Path, ranks: Ranks | None, directory: Path | None = None) -> BaseParts:
    """Read a snapshot that `write_base` wrote, by however many ranks.

    Args:
        path: The path of the snapshot.
        ranks: The processes that shall hold one shard each. Default: this process holds all pairs.
        directory: Where files of rows are written that are divided differently now, and those that take the
            place of read ones. Default: that of the snapshot.

    Returns:
        The base, on the CPU.

    Raises:
        SnapshotError: A file is missing, damaged or of another format.
    """
    contents = [(file, *read_snapshot(file)) for file in find_complete_snapshot(path)]
    first = contents[0]
    try:
        kept = {name: first[1][name] for name in REPLICATED}
        index = str(first[2]["index"])
    except KeyError as error:
        raise SnapshotError(f"The knowledge snapshot {first[0]} lacks {error}.") from error
    clips = None
    if CLIPS[0] in first[1]:
        clips = StoredClips(first[1][CLIPS[0]], first[1][CLIPS[1]], Ranks())
    shard = RowShard.interleaved(len(kept["ids"]), ranks or Ranks())
    if index == "auto" and Ranks.current().size > 1 and "row_checksums" not in first[2]:
        index = "exact"  # as when a base is built: it is the same wherever it comes from
    local: StoredPairs
    if "row_checksums" in first[2]:
        local = _read_files(contents, shard, index, directory or path.parent)
    else:
        local = _read_tensors(contents, shard, index)
    fine: PairStore = ShardedPairs(local, shard) if shard.ranks.size > 1 else local
    coarse = StoredPairs(kept["coarse_audio"], kept["coarse_text"])
    return BaseParts(fine, coarse, kept["ids"], clips, first[1].get(CAPTIONS))


_Content = tuple[Path, dict[str, Tensor], dict[str, object]]


def _learnt_of(content: _Content) -> Learnt:
    """What the indexes of the rank that wrote a file have learnt."""
    file, tensors, settings = content
    descriptions: dict[str, Any] = settings.get("learnt", {})  # type: ignore[assignment]
    try:
        audio, text = (
            TrainedIndex.of_tensor(tensors[name], descriptions[name]) if name in descriptions else None
            for name in LEARNT
        )
    except (KeyError, TypeError) as error:
        raise SnapshotError(f"The knowledge snapshot {file} lacks {error}.") from error
    return audio, text


def _rows_of(content: _Content, is_only: bool, shard: RowShard) -> Tensor:
    """The global numbers of the rows that a shard file has."""
    file, tensors, _ = content
    if is_only:
        return torch.arange(shard.num_rows)
    try:
        return tensors["rows"]
    except KeyError as error:
        raise SnapshotError(f"The knowledge snapshot {file} lacks {error}.") from error


def _read_tensors(contents: list[_Content], shard: RowShard, index: str) -> StoredPairs:
    """This rank's pairs out of tensors."""
    kept: dict[str, Tensor] = {}
    for content in contents:
        file, tensors, _ = content
        owner, local_rows = shard.locate(_rows_of(content, len(contents) == 1, shard))
        is_own = owner == shard.ranks.rank
        for name in SHARDED:
            if name not in tensors:
                raise SnapshotError(f"The knowledge snapshot {file} lacks {name!r}.")
            if name not in kept:
                kept[name] = tensors[name].new_empty(shard.num_local_rows, tensors[name].shape[1])
            kept[name][local_rows[is_own]] = tensors[name][is_own]
    same = [
        one for one in contents if torch.equal(_rows_of(one, len(contents) == 1, shard), shard.global_rows())
    ]
    learnt = _learnt_of(same[0]) if same else (None, None)
    return StoredPairs(kept[SHARDED[0]], kept[SHARDED[1]], index, learnt)


def _read_files(contents: list[_Content], shard: RowShard, index: str, directory: Path) -> MappedPairs:
    """This rank's pairs out of files."""
    parts, numbers = [], []
    for content in contents:
        file = content[0]
        try:
            files = PairFiles.open(rows_stem(file))
        except RowFileError as error:
            raise SnapshotError(f"The knowledge snapshot {file} lacks its rows. {error}") from error
        rows = _rows_of(content, len(contents) == 1, shard)
        parts.append(files)
        numbers.append(rows)
        if len(rows) != len(files.audio):
            raise SnapshotError(f"The knowledge snapshot {file} is damaged: its rows are of another number.")
    wanted = shard.global_rows()
    for content, files, rows in zip(contents, parts, numbers, strict=True):
        if torch.equal(rows, wanted):
            _verify(content, files, rows)
            pairs = MappedPairs.of_files(files, index, directory, learnt=_learnt_of(content))
            if shard.ranks.size == 1:
                vars(pairs)["checksums"] = tuple(content[2]["row_checksums"])  # type: ignore[arg-type]
            return pairs
    for content, files, rows in zip(contents, parts, numbers, strict=True):
        _verify(content, files, rows)
    return MappedPairs.of_files(_divide(parts, numbers, wanted, directory), index, directory)


def _verify(content: _Content, files: PairFiles, rows: Tensor) -> None:
    """Refuse rows that are not those that were written."""
    file, _, settings = content
    if list(files.checksums(rows)) != settings["row_checksums"]:
        raise SnapshotError(
            f"The knowledge snapshot {file} is damaged: the checksum of its rows is another than when they "
            "were written."
        )


def _divide(parts: list[PairFiles], numbers: list[Tensor], wanted: Tensor, directory: Path) -> PairFiles:
    """Write files of other rows: those with the numbers `wanted`."""
    total = sum(map(len, numbers))
    part_of = torch.empty(total, dtype=torch.int64)
    place_in = torch.empty(total, dtype=torch.int64)
    for part, rows in enumerate(numbers):
        part_of[rows], place_in[rows] = part, torch.arange(len(rows))
    writer = PairWriter(directory, len(wanted))
    for block in wanted.split(ROWS_PER_BLOCK):
        sides = [torch.empty(len(block), side.shape[1], dtype=torch.float16) for side in parts[0].sides]
        for part, files in enumerate(parts):
            here = part_of[block] == part
            for side, file in zip(sides, files.sides, strict=True):
                side[here] = file.read(place_in[block[here]])
        writer.append_stored(*sides)
    return writer.finish()
