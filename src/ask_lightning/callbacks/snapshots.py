"""The knowledge of a run on disk: written beside the checkpoints, restored, and removed when not needed."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.row_files import paths_of
from ask_lightning.knowledge.snapshot_file import (
    SnapshotError,
    files_of_snapshot,
    find_snapshot,
    rows_stem,
    snapshot_paths,
)
from ask_lightning.utilities.atomic_files import remove_abandoned
from ask_lightning.utilities.checkpoint_directory import common_file
from ask_lightning.utilities.distributed import Ranks

_PREFIX = "knowledge-"
# So many superseded snapshots are worth a word where nothing removes them.
_PILE = 3


@dataclass
class SnapshotRecord:
    """What a run knows of its snapshots on disk, shared by the writer, the restorer and the collector.

    Attributes:
        checkpoint_directories: Directories of the callbacks that write checkpoints; if there is none, no
            snapshot is ever removed.
        root: Directory into which Lightning itself writes a checkpoint when a cluster takes the machine
            away, if it is local.
        written: Snapshots of this run that are on disk, the one in use among them.
        current: Snapshot of the knowledge in use, once it is written.
        is_handled: Whether the knowledge in use has been written to `handled_directory`, or cannot be.
        handled_directory: Directory that `is_handled` speaks of; `None` for a place that is not local.
    """

    checkpoint_directories: set[Path] = field(default_factory=set)
    root: Path | None = None
    written: list[Path] = field(default_factory=list)
    current: Path | None = None
    is_handled: bool = False
    handled_directory: Path | None = None

    @property
    def superseded(self) -> list[Path]:
        """Snapshots on disk of knowledge that is no longer in use."""
        return [path for path in self.written if path != self.current]

    def supersede(self) -> None:
        """Note that new knowledge is in use, which is not on disk yet."""
        self.current, self.is_handled, self.handled_directory = None, False, None

    def mark_handled(self, directory: Path | None) -> None:
        """Note that the knowledge in use has been written to a directory, or cannot be."""
        self.is_handled, self.handled_directory = True, directory

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the file name of the current snapshot, other names without their suffix.

        So the file name of a snapshot occurs in the checkpoints that need it, and in no other.
        """
        return {
            "snapshot": str(self.current) if self.current else None,
            "other_snapshots": [str(path.with_suffix("")) for path in self.superseded],
            "checkpoint_directories": sorted(map(str, self.checkpoint_directories)),
        }


class SnapshotWriter:
    """Writes the knowledge in use beside the checkpoints.

    Args:
        record: The snapshots of the run.
    """

    def __init__(self, record: SnapshotRecord) -> None:
        self.record = record

    def write(self, base: KnowledgeBase, epoch: int, directory: Path | None) -> None:
        """Write the knowledge in use, once for each directory; where that fails there is a warning.

        Args:
            base: The knowledge in use.
            epoch: The epoch whose encoders made it.
            directory: The directory of the checkpoints; `None` if it is not local.
        """
        record = self.record
        # A resumed run may write to another directory than the run that wrote the snapshot.
        if record.is_handled and record.handled_directory == directory:
            return
        record.mark_handled(directory)
        consequence = "Training goes on; a run resumed from this checkpoint will encode its knowledge anew."
        if directory is None:
            warn(
                f"The knowledge of epoch {epoch} is not saved, because the checkpoints go to a place that is "
                f"not a local directory. {consequence}",
                stacklevel=3,
            )
            return
        path = directory / f"{_PREFIX}epoch={epoch}-{base.fingerprint}.safetensors"
        if Ranks.current().rank == 0:
            remove_abandoned(directory, f"{_PREFIX}*")
        # Known before it is there: a cluster's signal may ask for a checkpoint meanwhile.
        before, record.current = record.current, path
        failure = self._save(base, path)
        if failure is None:
            record.written += [path] if path not in record.written else []
            return
        if Ranks.current().rank == 0:
            warn(
                f"The knowledge of epoch {epoch} could not be written ({failure}). {consequence}",
                stacklevel=3,
            )
        record.current = before or path  # so that a resumed run can say what it misses

    def _save(self, base: KnowledgeBase, path: Path) -> str | None:
        """Save the base; the error message if that fails. Collective for a sharded base."""
        ranks, failure = Ranks.current(), None
        try:
            # One copy of a replicated base is enough; of a sharded one each rank writes its shard.
            if base.is_sharded or ranks.rank == 0:
                base.save(path)
        except OSError as error:
            failure = str(error)
        if base.is_sharded:  # no checkpoint is written before all shards are there
            failure = next((text for text in ranks.all_gather_object(failure) if text is not None), None)
            if failure is not None and path not in self.record.written:
                with suppress(OSError):  # a shard of a snapshot that is not whole is of no use
                    own = snapshot_paths(path, ranks.size)[ranks.rank]
                    for file in (own, *paths_of(rows_stem(own))):
                        file.unlink(missing_ok=True)
        return failure


class SnapshotRestorer:
    """Reads the knowledge that a resumed run had in use.

    Args:
        record: The snapshots of the run.
    """

    def __init__(self, record: SnapshotRecord) -> None:
        self.record = record

    def restore(
        self,
        state: Mapping[str, Any],
        checkpoint_directory: Path | None,
        ranks: Ranks,
        *,
        sharded: bool,
        rows_directory: Path | None = None,
    ) -> KnowledgeBase:
        """Read the knowledge that a checkpoint names; collective.

        Args:
            state: The `state` of the record of the run that wrote the checkpoint, and the `fingerprint` of
                the knowledge.
            checkpoint_directory: The directory of the checkpoint, to which its snapshots may have moved
                together with it.
            ranks: The processes of this run; there may be more or fewer than wrote the snapshot.
            sharded: Whether each rank shall hold a shard.
            rows_directory: The directory of the run for the rows of `storage="memmap"`.

        Returns:
            The base, on the CPU.

        Raises:
            SnapshotError: The snapshot is missing, damaged or another one, on this rank or on another.
        """
        if state["snapshot"] is None:
            raise SnapshotError("The checkpoint was saved without its knowledge (`save_knowledge=False`).")
        path = _present_location(Path(state["snapshot"]), checkpoint_directory)
        base, failure = None, None
        try:
            base = KnowledgeBase.load(path, ranks=ranks if sharded else None, directory=rows_directory)
        except (SnapshotError, OSError) as error:
            failure = str(error)
        _raise_first(ranks.all_gather_object(failure))
        assert base is not None
        if base.fingerprint != state["fingerprint"]:
            failure = f"{path} holds {base}, which is not the knowledge that the checkpoint names."
        _raise_first(ranks.all_gather_object(failure))
        self._adopt(path, state, checkpoint_directory)
        return base

    def _adopt(self, path: Path, state: Mapping[str, Any], checkpoint_directory: Path | None) -> None:
        """Make the snapshots of the earlier run those of this one."""
        record = self.record
        record.current = path
        record.mark_handled(path.parent)
        # Snapshots stay as they are if checkpoints may need them in a directory that this run does not watch.
        if record.checkpoint_directories >= set(map(Path, state["checkpoint_directories"])):
            others = (
                _present_location(Path(f"{name}.safetensors"), checkpoint_directory)
                for name in state["other_snapshots"]
            )
            record.written = [path, *(other for other in others if find_snapshot(other))]


class SnapshotCollector:
    """Removes the snapshots that no checkpoint needs any more.

    Args:
        record: The snapshots of the run.
    """

    def __init__(self, record: SnapshotRecord) -> None:
        self.record = record
        self._contents: dict[tuple[Path, int, int], bytes] = {}
        self._unreadable: set[Path] = set()
        self._warned_of_pile = False

    def collect(self) -> None:
        """Remove the snapshots that no checkpoint names, except that of the knowledge in use."""
        record = self.record
        superseded = record.superseded
        if not superseded:
            return
        if not record.checkpoint_directories:
            self._warn_of_pile(superseded)
            return
        if Ranks.current().rank > 0:  # rank 0 writes the checkpoints and sees them first
            record.written = [path for path in record.written if path == record.current]
            return
        contents, unreadable_since = self._contents_of_checkpoints()
        for path in superseded:
            if any(path.name.encode() in content for content in contents):
                continue
            try:
                files = files_of_snapshot(path)
                # A checkpoint that cannot be read may need any snapshot that was there when it was written.
                if any(file.stat().st_mtime <= unreadable_since for file in files):
                    continue
                for file in files:
                    file.unlink()
            except OSError as error:
                warn(f"The superseded knowledge {path} could not be removed ({error}).", stacklevel=3)
            record.written.remove(path)

    def _warn_of_pile(self, superseded: list[Path]) -> None:
        """Say once that snapshots are never removed here, when there are several."""
        if len(superseded) >= _PILE and not self._warned_of_pile and Ranks.current().rank == 0:
            self._warned_of_pile = True
            size = sum(file.stat().st_size for path in superseded for file in files_of_snapshot(path))
            warn(
                f"{len(superseded)} snapshots of superseded knowledge ({size / 2**20:.0f} MiB) lie "
                f"in {superseded[0].parent}, and none is removed, because it cannot be seen here which of "
                "them checkpoints need: the trainer has no ModelCheckpoint, or one that saves to a remote "
                "directory, asynchronously or in another format. Add one that does not, remove them by hand, "
                "or pass KnowledgeRefreshCallback(save_knowledge=False).",
                stacklevel=4,
            )

    def _contents_of_checkpoints(self) -> tuple[list[bytes], float]:
        """The relevant content of every checkpoint, and when the last unreadable one was written."""
        record = self.record
        files = [file for folder in record.checkpoint_directories for file in folder.glob("**/*.ckpt")]
        files += record.root.glob("hpc_ckpt_*.ckpt") if record.root else []
        contents, unreadable_since = [], -math.inf
        for file in files:
            try:
                contents.append(self._content(file))
            except FileNotFoundError:
                continue
            except (OSError, zipfile.BadZipFile, ValueError) as error:
                with suppress(FileNotFoundError):
                    unreadable_since = max(unreadable_since, file.stat().st_mtime)
                self._warn_of_unreadable(file, error)
        self._contents = {key: content for key, content in self._contents.items() if key[0] in files}
        return contents, unreadable_since

    def _warn_of_unreadable(self, checkpoint: Path, error: Exception) -> None:
        """Say once for each file that a checkpoint cannot be read."""
        if checkpoint not in self._unreadable:
            self._unreadable.add(checkpoint)
            warn(
                f"The checkpoint {checkpoint} cannot be read ({error}), so knowledge that was saved before "
                "it is kept, as it may need it. Remove the file if it is none of this run.",
                stacklevel=4,
            )

    def _content(self, checkpoint: Path) -> bytes:
        """The bytes of a checkpoint in which snapshot names can occur; nothing in it is unpickled."""
        file: Path | None = checkpoint
        if checkpoint.is_dir():
            file = common_file(checkpoint)
        if file is None:  # a rank was killed while it wrote, and nobody can resume from it
            raise FileNotFoundError(checkpoint)
        state = file.stat()
        key = (checkpoint, state.st_mtime_ns, state.st_size)
        if key not in self._contents:
            with zipfile.ZipFile(file) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                content = archive.read(name)
            # Of a large checkpoint only the end that can name snapshots is kept in memory.
            start = content.find(_PREFIX.encode())
            self._contents[key] = b"" if start < 0 else content[start:]
        return self._contents[key]


def checkpoint_directories(trainer: pl.Trainer) -> list[Path]:
    """The directories of all checkpoints of a trainer; empty if one of them cannot be watched from here."""
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        return []  # a checkpoint may be half written, and unreadable until it is whole
    directories: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        directory = getattr(callback, "dirpath", None)
        path = local_path(directory) if directory else None
        if path is None or getattr(callback, "FILE_EXTENSION", ".ckpt") != ".ckpt":
            return []
        directories.append(path)
    return directories


def knowledge_directory(trainer: pl.Trainer) -> Path | None:
    """The directory for snapshots, beside the checkpoints; `None` if it is not local."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return local_path(callback.dirpath)
    return local_path(trainer.log_dir or trainer.default_root_dir)


def local_path(directory: str | os.PathLike[str]) -> Path | None:
    """The absolute path of a directory, since a resumed run may start elsewhere; `None` if it is remote."""
    return None if "://" in str(directory) else Path(directory).absolute()


def _present_location(recorded: Path, checkpoint_directory: Path | None) -> Path:
    """Where a snapshot is now: checkpoints may be moved together with the files beside them."""
    if checkpoint_directory is not None and find_snapshot(checkpoint_directory / recorded.name):
        return checkpoint_directory / recorded.name
    return recorded


def _raise_first(failures: Iterable[str | None]) -> None:
    """Raise the first failure of any rank, on every rank."""
    for failure in failures:
        if failure is not None:
            raise SnapshotError(failure)
