"""Reading what `Trainer` has written: one file, or a directory with a part of the model by each rank."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

# What Lightning puts into such a directory beside weights and optimisers, which torch has written.
_OF_ALL_RANKS = "meta.pt"


def read_checkpoint(
    path: str | Path, *, map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint of `Trainer`, in one process.

    Args:
        path: Path or URL of a file, or path of a directory that FSDP2 or FSDP has written.
        map_location: Argument `map_location` of `torch.load`.
        weights_only: Argument `weights_only` of `torch.load`.

    Returns:
        The checkpoint, with whole weights under `"state_dict"`. That of a directory has no states of
        optimisers.
    """
    options: dict[str, Any] = {"map_location": map_location, "weights_only": weights_only}
    if "://" not in str(path) and (Path(path) / _OF_ALL_RANKS).is_file():
        checkpoint: dict[str, Any] = torch.load(Path(path) / _OF_ALL_RANKS, **options)
        with TemporaryDirectory() as folder:
            joined = Path(folder) / "joined.ckpt"
            dcp_to_torch_save(path, joined)
            parts = torch.load(joined, **options)
        # FSDP2's name and FSDP's.
        return checkpoint | {"state_dict": parts["state_dict" if "state_dict" in parts else "model"]}
    with get_filesystem(path).open(str(path), "rb") as file:
        return torch.load(file, **options)  # type: ignore[no-any-return]
