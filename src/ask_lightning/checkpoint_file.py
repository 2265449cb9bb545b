"""Reading what `Trainer` has written: one file, or a directory with a part of the model by each rank."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from ask_lightning.utilities.checkpoint_directory import OF_DEEPSPEED, OF_FSDP


def read_checkpoint(
    path: str | Path, *, map_location: Any = None, weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint of `Trainer`, in one process.

    Args:
        path: Path or URL of a file, or path of a directory that FSDP2, FSDP or DeepSpeed has written.
        map_location: Argument `map_location` of `torch.load`.
        weights_only: Argument `weights_only` of `torch.load`.

    Returns:
        The checkpoint, with whole weights under `"state_dict"`. That of a directory has no states of
        optimisers. Weights that DeepSpeed trained in half precision are those of its forward passes, in half
        precision.
    """
    options: dict[str, Any] = {"map_location": map_location, "weights_only": weights_only}
    if "://" not in str(path):
        if (Path(path) / OF_FSDP).is_file():
            return _read_of_fsdp(Path(path), options)
        if (Path(path) / OF_DEEPSPEED).is_file():
            checkpoint = torch.load(Path(path) / OF_DEEPSPEED, **options)
            weights, _ = checkpoint.pop("module"), checkpoint.pop("optimizer")
            return checkpoint | {"state_dict": weights}  # type: ignore[no-any-return]
    with get_filesystem(path).open(str(path), "rb") as file:
        return torch.load(file, **options)  # type: ignore[no-any-return]


def _read_of_fsdp(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Put the parts of the ranks together that torch has written."""
    checkpoint: dict[str, Any] = torch.load(directory / OF_FSDP, **options)
    with TemporaryDirectory() as folder:
        joined = Path(folder) / "joined.ckpt"
        dcp_to_torch_save(directory, joined)
        parts = torch.load(joined, **options)
    # FSDP2's name and FSDP's.
    return checkpoint | {"state_dict": parts["state_dict" if "state_dict" in parts else "model"]}
