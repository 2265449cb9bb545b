"""Files that are there as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

TEMPORARY = ".tmp"
"""Suffix of the temporary names under which files are written."""


@contextmanager
def atomic_write(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Write a file under a temporary name that is renamed to `path` when the context ends without an error.

    Even if this process is killed, a reader of `path` finds the old file, the complete new one, or none. The
    temporary name is a hidden one in the folder of `path` and unique to this call, so that several processes
    can write the same file.

    Args:
        path: Path of the file; its folder is created if it does not exist.
        flush: Whether to wait until the data are on the disk before the file is renamed, so that a power
            failure leaves no empty file. Files that can be computed again do not need it.

    Yields:
        The temporary path; there is no file yet.

    Raises:
        OSError: The folder cannot be made or written to.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.txt"
        ...     with atomic_write(path) as temporary:
        ...         _ = temporary.write_text("whole")
        ...     path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        if flush:
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
