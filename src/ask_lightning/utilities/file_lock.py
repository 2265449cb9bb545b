"""A lock for which other processes wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, if the file system has locks; without them, several processes may go on.

    The operating system releases it if the process is killed.

    Args:
        path: Path of the lock file, which is removed at the end.

    Raises:
        OSError: The file cannot be written or locked.
    """
    from filelock import FileLock

    lock = FileLock(path)
    try:
        lock.acquire()
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
