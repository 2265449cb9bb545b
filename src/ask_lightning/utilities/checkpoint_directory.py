"""Checkpoints of `Trainer` that are directories, into which each rank writes its part."""

from __future__ import annotations

from pathlib import Path

# What Lightning puts beside weights and optimisers, which torch writes for FSDP2 and FSDP.
OF_FSDP = "meta.pt"
# Weights that are whole on every rank, and what Lightning adds; DeepSpeed writes the optimisers beside it.
OF_DEEPSPEED = "checkpoint/mp_rank_00_model_states.pt"


def common_file(directory: Path) -> Path | None:
    """Find the file of a checkpoint that holds what is the same on all ranks.

    Args:
        directory: The checkpoint, of FSDP2, FSDP or DeepSpeed.

    Returns:
        The file, or None for a directory of another kind.
    """
    files = (directory / name for name in (OF_FSDP, OF_DEEPSPEED))
    return next((file for file in files if file.is_file()), None)
