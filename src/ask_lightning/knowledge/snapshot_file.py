"""Named tensors in one safetensors file that is written whole or not at all."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ask_lightning.knowledge.checksum import checksum
from ask_lightning.utilities.atomic_files import written_whole

_FORMAT = "ask-lightning knowledge 2"


class SnapshotError(RuntimeError):
    """A snapshot is missing, damaged or not one of ours."""


def part_path(path: Path, rank: int, size: int) -> Path:
    """The file of one rank, of a snapshot that `size` ranks write."""
    return path.with_name(f"{path.stem}.part-{rank}-of-{size}{path.suffix}")


def snapshot_files(path: Path) -> list[Path]:
    """The file, or the files of the ranks that wrote it together; none if it is not there."""
    if path.is_file():
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.part-*-of-*{path.suffix}"))


def write_snapshot(
    path: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
    checksums: Mapping[str, int] | None = None,
) -> None:
    """Write tensors and settings, as a whole or not at all.

    Args:
        path: The file; its directory is made if need be.
        tensors: By name, any device.
        settings: JSON values.
        checksums: Of the tensors by name, where they are known already.

    Raises:
        OSError: The directory cannot be written to or the disk is full; `path` is as it was.
    """
    if checksums is None:
        checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    try:
        with written_whole(path) as temporary:
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
    """Tensors and settings of a snapshot.

    Args:
        path: The file.

    Raises:
        SnapshotError: The file is missing, truncated, changed or of another format; the message says
            which.
    """
    while True:
        found = _identity(path)
        try:
            return _read(path)
        except SnapshotError:
            # The library opens a file twice, for its head and for its numbers; another process may have put
            # a new one in its place between.
            if _identity(path) == found:
                raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
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
