"""Checkpoints that are there as a whole or not at all, wherever temporary files of the system are."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ask_lightning.utilities.atomic_files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, to which it is renamed.

    Lightning's own is written to the system's folder for temporary files. Where that is another file system
    it is copied from there, over the checkpoint of the same name: a run that is killed meanwhile, or whose
    disk is full, has lost both.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; see `TorchCheckpointIO`.

        Args:
            checkpoint: The state of model and trainer.
            path: Path or URL of the checkpoint.
            storage_options: None.

        Raises:
            OSError: It cannot be written; what was there is as it was.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = BytesIO()
        torch.save(checkpoint, content)
        with atomic_write(Path(path)) as temporary:
            temporary.write_bytes(content.getbuffer())
