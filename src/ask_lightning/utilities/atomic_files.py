"""Files that are there as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

TEMPORARY = ".tmp"
"""How the names end under which files are written."""


@contextmanager
def written_whole(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A name to write under, which becomes `path` when the context ends without an error.

    Whoever reads `path`, at whatever moment this process is killed, finds the old file, the new one, or
    none. The name is hidden, beside `path`, and of this call alone, whoever else writes the same file.

    Args:
        path: The file; its folder is made if need be.
        flush: Whether the data shall be on the disk before the name is, so that a power failure leaves no
            empty file. Not needed for what can be made again.

    Yields:
        The name to write under; nothing is there yet.

    Raises:
        OSError: The folder cannot be made or written to.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.txt"
        ...     with written_whole(path) as temporary:
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
