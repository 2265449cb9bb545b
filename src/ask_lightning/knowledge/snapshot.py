"""Named tensors in one safetensors file that is written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "ask-lightning knowledge 1"


class SnapshotError(RuntimeError):
    """A snapshot is missing, damaged or not one of ours."""


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> None:
    """Write tensors and settings under a temporary name, flush them to disk, then rename.

    Whoever reads `path`, at whatever moment this process is killed, finds the old file, the new one, or
    none.

    Args:
        path: The file; its directory is made if need be.
        tensors: By name, any device.
        settings: JSON values.

    Raises:
        OSError: The directory cannot be written to or the disk is full; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": _FORMAT, "settings": json.dumps(dict(settings))},
        )
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"Cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and settings of a snapshot.

    Args:
        path: The file.

    Raises:
        SnapshotError: The file is missing, truncated or of another format; the message says which.
    """
    if not path.is_file():
        raise SnapshotError(f"There is no knowledge snapshot at {path}.")
    try:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SnapshotError(f"The knowledge snapshot {path} is damaged: {error}") from error
    if about.get("format") != _FORMAT:
        raise SnapshotError(
            f"{path} is not a knowledge snapshot that this version reads: "
            f"its format is {about.get('format')!r}, not {_FORMAT!r}."
        )
    try:
        return tensors, json.loads(about["settings"])
    except (KeyError, ValueError) as error:
        raise SnapshotError(
            f"The knowledge snapshot {path} is damaged: its settings are {error!r}."
        ) from error
