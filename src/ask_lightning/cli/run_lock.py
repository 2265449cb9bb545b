"""Keeps two runs from writing to the same folder at the same time."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ask_lightning.cli.errors import UsageError, usage_errors
from ask_lightning.utilities.file_lock import LockHeldError, file_lock


@contextmanager
def locked_run(folder: Path, flag: str = "--run") -> Iterator[None]:
    """Hold the lock of a run's folder; the operating system releases it if the process is killed.

    Only the first process of a run takes it.

    Args:
        folder: Folder of the run, made if it does not exist.
        flag: The flag that another folder or file is passed by.

    Raises:
        UsageError: Another process holds the lock, or the folder cannot be written to.
    """
    if not is_first_process():
        yield
        return
    try:
        with ExitStack() as held:
            try:
                with usage_errors():
                    folder.mkdir(parents=True, exist_ok=True)
                    is_locked = held.enter_context(file_lock(folder / ".lock", wait=False))
            except LockHeldError as error:
                raise UsageError(
                    f"Another run is writing to {folder} at this moment. Wait for its end, or pass another "
                    f"path as `{flag}`."
                ) from error
            if not is_locked:
                from lightning.pytorch.utilities import rank_zero_warn

                rank_zero_warn(
                    f"The file system of {folder} has no locks: nobody notices if another run writes there "
                    "too."
                )
            yield
    finally:
        with suppress(OSError):  # it is not empty, unless the run was refused before anything was written
            folder.rmdir()


def is_first_process() -> bool:
    """Whether this is the process of a run that starts the others, as the variables of launchers tell."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)
