"""Named tensors in safetensors files, each of which is written whole or not at all.

A sharded base is written as one file for each rank, the shard files of a snapshot.
"""

import glob
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.row_files import paths_of
from ask_lightning.utilities.atomic_files import atomic_write

_FORMAT = "ask-lightning knowledge 2"


class SnapshotError(RuntimeError):
    """A snapshot is missing, damaged or of another format."""


def snapshot_paths(path: Path, size: int) -> list[Path]:
    """The files of a snapshot that `size` ranks write: `path` itself, or one shard file for each rank."""
    if size == 1:
        return [path]
    return [path.with_name(f"{path.stem}.shard-{rank}-of-{size}{path.suffix}") for rank in range(size)]


def find_snapshot(path: Path) -> list[Path]:
    """The files of a snapshot that are on disk: `path` itself, or all shard files of that name.

    Args:
        path: The path that was passed to `KnowledgeBase.save`.
    """
    if path.is_file():
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.shard-*-of-*{path.suffix}"))


def rows_stem(file: Path) -> Path:
    """The stem of the files with the rows that belong to one file of a snapshot, see `row_files.paths_of`."""
    return file.with_suffix("")


def files_of_snapshot(path: Path) -> list[Path]:
    """All files of a snapshot that are on disk, those of its rows among them.

    Args:
        path: The path that was passed to `KnowledgeBase.save`.
    """
    found = find_snapshot(path)
    return found + [rows for file in found for rows in paths_of(rows_stem(file)) if rows.is_file()]


def find_complete_snapshot(path: Path) -> list[Path]:
    """The files that together hold a whole snapshot.

    Args:
        path: The path that was passed to `KnowledgeBase.save`.

    Raises:
        SnapshotError: There is no such file, or some shard files are missing.
    """
    found = find_snapshot(path)
    if not found:
        raise SnapshotError(f"There is no knowledge snapshot at {path}.")
    if found == [path]:
        return found
    missing: list[str] = []
    # Runs of different numbers of ranks may have written the same knowledge, not all of them to the end.
    for size in sorted({int(file.stem.rpartition("-")[2]) for file in found}):
        expected = snapshot_paths(path, size)
        if not (absent := [file.name for file in expected if file not in found]):
            return expected
        missing += absent
    raise SnapshotError(f"The knowledge snapshot {path} lacks {', '.join(missing)}.")


def write_snapshot(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
    checksums: Mapping[str, int] | None = None,
) -> None:
    """Write tensors and settings into one file, as a whole or not at all.

    Args:
        path: The file; its directory is made if need be.
        tensors: The tensors by name, on any device.
        settings: Values by name, such as JSON can hold.
        checksums: The `checksum` of each tensor by name, if they are known already.

    Raises:
        OSError: The directory cannot be written to or the disk is full; `path` is as it was.
    """
    if checksums is None:
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={
                    "format": _FORMAT,
                    "settings": json.dumps(dict(settings)),
                    "checksums": json.dumps(dict(checksums)),
                },
            )
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"Cannot write {path}: {error}") from error


def read_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read the tensors and settings of one file.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU, and settings by name.

    Raises:
        SnapshotError: The file is missing, truncated, changed or of another format; the message says
            which.
    """
    while True:
        found = _identity(path)
        try:
            return _read(path)
        except SnapshotError:
            # safetensors opens a file twice, for its header and for its tensors; in between another process
            # may have put a new file in its place.
            if _identity(path) == found:
                raise


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes when another file takes the place of this one."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read and verify a file once."""
    if not path.is_file():
        raise SnapshotError(f"There is no knowledge snapshot at {path}.")
    try:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:
        raise SnapshotError(f"The knowledge snapshot {path} is damaged: {error}") from error
    if about.get("format") != _FORMAT:
        raise SnapshotError(
            f"{path} is not a knowledge snapshot that this version reads: "
            f"its format is {about.get('format')!r}, not {_FORMAT!r}."
        )
    try:
        settings, checksums = json.loads(about["settings"]), json.loads(about["checksums"])
    except (KeyError, ValueError) as error:
        raise SnapshotError(
            f"The knowledge snapshot {path} is damaged: its settings are {error!r}."
        ) from error
    for name, tensor in tensors.items():
        if checksum(tensor) != checksums.get(name):
            raise SnapshotError(
                f"The knowledge snapshot {path} is damaged: the checksum of {name} is another than when it "
                "was written."
            )
    return tensors, settings
