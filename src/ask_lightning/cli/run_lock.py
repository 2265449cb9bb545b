"""Keeps two runs from writing to the same folder at the same time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ask_lightning.cli.errors import UsageError, usage_errors


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
    from filelock import FileLock, Timeout
    from lightning.pytorch.utilities import rank_zero_warn

    with usage_errors():
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except NotImplementedError:
            rank_zero_warn(
                f"The file system of {folder} has no locks: nobody notices if another run writes there too."
            )
        except Timeout as error:
            raise UsageError(
                f"Another run is writing to {folder} at this moment. Wait for its end, or pass another "
                f"path as `{flag}`."
            ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if not any(folder.iterdir()):  # refused before anything was written
            folder.rmdir()


def is_first_process() -> bool:
    """Whether this is the process of a run that starts the others, as the variables of launchers tell."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)
