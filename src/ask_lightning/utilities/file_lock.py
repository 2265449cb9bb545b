"""A lock that the operating system releases if its holder is killed."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How file systems say that they have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class LockHeldError(Exception):
    """Another process, or another part of this one, holds the lock."""


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file.

    Args:
        path: Path of the lock file, which is removed at the end.
        wait: Whether to wait for a lock that is held.

    Yields:
        Whether the lock is held. It is not where the file system has no locks: then several processes may go
        on.

    Raises:
        LockHeldError: The lock is held, and is not waited for.
        OSError: The file cannot be written or locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise LockHeldError(f"The lock {path} is held.") from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        lock.release()
