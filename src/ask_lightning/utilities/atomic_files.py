"""Files and folders that are there as a whole or not at all.

A file is written under a temporary name beside it. As long as its writer lives, it holds the lock of a second
file beside that one, by which others tell what a killed writer has left.
"""

import glob
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4
from zlib import crc32

from ask_lightning.utilities.file_lock import LockHeldError, file_lock

_TEMPORARY, _LOCK = ".tmp", ".lock"
# Locks of some file systems do not reach other machines, whose writers are left alone for so long.
_SECONDS_FOR_OTHER_MACHINES = 3600.0
_PRIVATE = 0o600
_MOST_NAMES = 10
_MACHINE = f"{crc32(platform.node().encode()):08x}"
_LOCK_NAME = re.compile(rf"\..+\.([0-9a-f]{{8}})[0-9a-f]{{32}}{re.escape(_LOCK)}", re.DOTALL)


@contextmanager
def atomic_write(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Write a file or a folder under a temporary name that is renamed to `path` when the context ends.

    After an error nothing is renamed. Even if this process is killed, a reader of `path` finds the old file,
    the complete new one, or none; what it leaves is removed by the next one that writes `path`. The temporary
    name is a hidden one in the folder of `path` and unique to this call, so that several processes can write
    the same file.

    Args:
        path: Path of the file, or of a folder that is new or empty; the folder in which it is is created if
            it does not exist.
        flush: Whether to wait until the data are on the disk before the file is renamed, so that a power
            failure leaves no empty file, and to look for what killed writers of `path` have left. Files that
            can be computed again, of which a folder may hold many, do not need it.

    Yields:
        The temporary path; there is no file yet.

    Raises:
        OSError: The folder cannot be made or written to. Where it is read-only or the disk is full, the error
            names `path`.

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
    if flush:
        remove_abandoned(path.parent, glob.escape(path.name))
    with _temporary_name(path) as temporary:
        try:
            yield temporary
            if flush:
                _flush(temporary)
            os.replace(temporary, path)
        except OSError as error:
            if error.filename is None and error.errno is not None:  # as when a write finds the disk full
                error.filename = str(path)
            raise
        finally:
            _remove(temporary)


@contextmanager
def _temporary_name(path: Path) -> Iterator[Path]:
    """A temporary name of this writer alone, whose lock is held."""
    with ExitStack() as held:
        for attempt in range(_MOST_NAMES):
            stem = f".{path.name}.{_MACHINE}{uuid4().hex}"
            try:
                held.enter_context(file_lock(path.with_name(f"{stem}{_LOCK}"), wait=False))
                break
            except LockHeldError:
                # Another process, which looks for what killed writers have left, came in between the file and
                # its lock. It removes the file.
                if attempt + 1 == _MOST_NAMES:
                    raise
            except OSError as error:
                error.filename = str(path)  # for the hidden name tells nobody what could not be written
                raise
        yield path.with_name(f"{stem}{_TEMPORARY}")


def remove_abandoned(folder: Path, names: str = "*") -> None:
    """Remove what writers of files in a folder have left when they were killed.

    What a living process is writing stays, and so does everything that `atomic_write` has not made. Where the
    file system has no locks, nothing is removed.

    Args:
        folder: The folder, which need not exist.
        names: Pattern of the names of the files that were to be written.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> (folder / ".a.tmp").touch()
        >>> remove_abandoned(folder)
        >>> [file.name for file in folder.iterdir()]
        ['.a.tmp']
    """
    for lock in folder.glob(f".{names}.*{_LOCK}"):
        temporary = lock.with_suffix(_TEMPORARY)
        # It may be gone or held by now, or belong to another user: it does no harm.
        with suppress(OSError, LockHeldError):
            if _may_have_died(lock):
                with file_lock(lock, wait=False) as is_locked:
                    if is_locked:
                        _remove(temporary)


def _may_have_died(lock: Path) -> bool:
    """Whether a file is a lock of `atomic_write` that tells about its writer."""
    named = _LOCK_NAME.fullmatch(lock.name)
    if named is None:
        return False
    return named[1] == _MACHINE or time.time() - lock.stat().st_mtime > _SECONDS_FOR_OTHER_MACHINES


def _flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk, with the permissions of any new file."""
    usual = _usual_permissions(path.with_name(f"{path.name}.new"))
    for file in path.rglob("*") if path.is_dir() else [path]:
        if not file.is_file() and file != path:
            continue
        with open(file, "rb") as written:
            if stat.S_IMODE(os.fstat(written.fileno()).st_mode) == _PRIVATE:
                file.chmod(usual)  # which safetensors makes private, whatever the umask
            os.fsync(written.fileno())


def _usual_permissions(unused: Path) -> int:
    """The permissions that a new file gets in a folder."""
    try:
        with open(unused, "xb") as new:
            return stat.S_IMODE(os.fstat(new.fileno()).st_mode)
    finally:
        unused.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
