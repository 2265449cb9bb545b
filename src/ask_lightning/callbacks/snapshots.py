"""The knowledge on disk: written beside the checkpoints, kept as long as one of them needs it."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from warnings import warn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.snapshot_file import SnapshotError, part_path, snapshot_files
from ask_lightning.utilities.atomic_files import TEMPORARY
from ask_lightning.utilities.distributed import Ranks

_PREFIX = "knowledge-"
# A file under a temporary name that nobody has written to for so long was left by a process that was killed.
_ABANDONED_SECONDS = 3600.0


class Snapshots:
    """The snapshots of a run; the last one is that of the knowledge in use, once that has been written."""

    def __init__(self) -> None:
        self._directories: set[Path] = set()
        self._root: Path | None = None
        self._written: list[Path] = []
        self._current: Path | None = None
        # The directory for which the knowledge in use was last written, if it was.
        self._seen_to: tuple[Path | None] | None = None
        self._mentions: dict[tuple[Path, int, int], bytes] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the snapshot of the knowledge in use by its name, others without suffix.

        So the name of a file occurs in the checkpoints that need it, and in no other.
        """
        others = [str(path.with_suffix("")) for path in self._written if path != self._current]
        return {
            "snapshot": str(self._current) if self._current else None,
            "other_snapshots": others,
            "checkpoint_directories": sorted(map(str, self._directories)),
        }

    def watch(self, directories: Collection[Path], root: Path | None) -> None:
        """Say where the run's checkpoints go.

        Args:
            directories: Of the callbacks that write them; without any, nothing is ever removed.
            root: Where Lightning itself writes one when a cluster takes the machine away, if that is local.
        """
        self._directories, self._root = set(directories), root

    def supersede(self) -> None:
        """New knowledge is in use, which is not on disk yet."""
        self._current = self._seen_to = None

    def write(self, base: KnowledgeBase, epoch: int, directory: Path | None) -> None:
        """Put the knowledge in use beside the checkpoints, once; a warning where that is not possible.

        Args:
            base: The knowledge.
            epoch: Whose encoders made it.
            directory: Where the checkpoints go; `None` if that is not a local directory.
        """
        # A resumed run may write to another directory than the run that wrote the snapshot.
        if self._seen_to == (directory,):
            return
        self._seen_to = (directory,)
        consequence = "Training goes on; a run resumed from this checkpoint will encode its knowledge anew."
        if directory is None:
            warn(
                f"The knowledge of epoch {epoch} is not saved, because the checkpoints go to a place that is "
                f"not a local directory. {consequence}",
                stacklevel=3,
            )
            return
        path = directory / f"{_PREFIX}epoch={epoch}-{base.fingerprint}.safetensors"
        ranks, failure = Ranks.current(), None
        try:
            # Of a replicated base one copy is enough; of a sharded one each rank writes its part.
            if base.is_sharded or ranks.rank == 0:
                base.save(path)
        except OSError as error:
            failure = str(error)
        if base.is_sharded:  # the checkpoint is written when all parts are there
            failure = next((text for text in ranks.all_gather_object(failure) if text is not None), None)
        if failure is not None:
            if base.is_sharded and path not in self._written:
                with suppress(OSError):  # of a snapshot that is not whole
                    part_path(path, ranks.rank, ranks.size).unlink(missing_ok=True)
            if ranks.rank == 0:
                warn(
                    f"The knowledge of epoch {epoch} could not be written ({failure}). {consequence}",
                    stacklevel=3,
                )
            self._current = self._current or path  # a resumed run shall say what it misses
        else:
            self._current = path
            self._written += [path] if path not in self._written else []

    def restore(
        self, state: Mapping[str, Any], beside: Path | None, ranks: Ranks, *, sharded: bool
    ) -> KnowledgeBase:
        """The knowledge that a checkpoint names; collective.

        Args:
            state: What `state` returned, and the knowledge's `fingerprint`.
            beside: The directory of the checkpoint, with which its snapshots may have moved.
            ranks: The processes; whatever their number was when the snapshot was written.
            sharded: Whether each shall hold a part.

        Returns:
            The base, on the CPU.

        Raises:
            SnapshotError: It is missing, damaged or another one, on this rank or on another.
        """
        if state["snapshot"] is None:
            raise SnapshotError("The checkpoint was saved without its knowledge (`save_knowledge=False`).")
        path = _moved(Path(state["snapshot"]), beside)
        base, failure = None, None
        try:
            base = KnowledgeBase.load(path, ranks=ranks if sharded else None)
        except SnapshotError as error:
            failure = str(error)
        _raise_first(ranks.all_gather_object(failure))
        assert base is not None
        if base.fingerprint != state["fingerprint"]:
            failure = f"{path} holds {base}, which is not the knowledge that the checkpoint names."
        _raise_first(ranks.all_gather_object(failure))
        self._current, self._seen_to = path, (path.parent,)
        # Where checkpoints may need them that are not looked at from here, the old run's snapshots stay.
        if self._directories >= set(map(Path, state["checkpoint_directories"])):
            others = (_moved(Path(f"{name}.safetensors"), beside) for name in state["other_snapshots"])
            self._written = [path, *(other for other in others if snapshot_files(other))]
        return base

    def remove_unneeded(self) -> None:
        """Remove the snapshots that no checkpoint mentions, but for that of the knowledge in use."""
        superseded = [path for path in self._written if path != self._current]
        if not superseded or not self._directories:
            return
        if Ranks.current().rank > 0:  # rank 0 writes the checkpoints and sees them first
            self._written = [path for path in self._written if path == self._current]
            return
        self._remove_abandoned({path.parent for path in superseded})
        try:
            files = [file for place in self._directories for file in place.glob("**/*.ckpt")]
            files += self._root.glob("hpc_ckpt_*.ckpt") if self._root else []
            mentions = [self._mention(file) for file in files]
        except (OSError, zipfile.BadZipFile, ValueError):
            return  # one that cannot be read may need any of them
        self._mentions = {key: text for key, text in self._mentions.items() if key[0] in files}
        for path in superseded:
            if any(path.name.encode() in mention for mention in mentions):
                continue
            try:
                for file in snapshot_files(path):
                    file.unlink()
            except OSError as error:
                warn(f"The superseded knowledge {path} could not be removed ({error}).", stacklevel=3)
            self._written.remove(path)

    def _mention(self, checkpoint: Path) -> bytes:
        """The part of a checkpoint in which its texts are; nothing of it is executed."""
        state = checkpoint.stat()
        key = (checkpoint, state.st_mtime_ns, state.st_size)
        if key not in self._mentions:
            with zipfile.ZipFile(checkpoint) as archive:
                (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                content = archive.read(name)
            # Of a large checkpoint only what can matter is remembered.
            start = content.find(_PREFIX.encode())
            self._mentions[key] = b"" if start < 0 else content[start:]
        return self._mentions[key]

    @staticmethod
    def _remove_abandoned(places: Iterable[Path]) -> None:
        for place in places:
            for file in place.glob(f".{_PREFIX}*{TEMPORARY}"):
                with suppress(OSError):  # it is not in the way
                    if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                        file.unlink()


def checkpoint_directories(trainer: pl.Trainer) -> list[Path]:
    """The directories of the trainer's checkpoints; none if not all of them can be watched from here."""
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        return []  # a checkpoint may be on its way that nobody can read yet
    places: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        directory = getattr(callback, "dirpath", None)
        place = local_path(directory) if directory else None
        if place is None or getattr(callback, "FILE_EXTENSION", ".ckpt") != ".ckpt":
            return []
        places.append(place)
    return places


def knowledge_directory(trainer: pl.Trainer) -> Path | None:
    """Beside the checkpoints; absolute, because a resumed run may start elsewhere. `None` if not local."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return local_path(callback.dirpath)
    return local_path(trainer.log_dir or trainer.default_root_dir)


def local_path(directory: str | os.PathLike[str]) -> Path | None:
    """Absolute, because a resumed run may start elsewhere; `None` for a place that is not on a disk here."""
    return None if "://" in str(directory) else Path(directory).absolute()


def _moved(recorded: Path, beside: Path | None) -> Path:
    """Checkpoints move between machines together with what lies beside them."""
    if beside is not None and snapshot_files(beside / recorded.name):
        return beside / recorded.name
    return recorded


def _raise_first(failures: Iterable[str | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise SnapshotError(failure)
