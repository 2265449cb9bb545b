"""Embeddings of pairs in files of their own: written row after row, read by row and by block.

Rows are unit vectors in float16, in NumPy's file format. Files are written through the file system's calls
and not through a mapping, so that a full disk is an error and no crash; they are mapped for reading only.

Axes: `N` rows, `d` width.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import IO
from uuid import uuid4

import numpy as np
import torch
from numpy.lib import format as numpy_format
from torch import Tensor

from ask_lightning.functional.injection import unit_length
from ask_lightning.knowledge.checksum import checksum
from ask_lightning.utilities.atomic_files import atomic_write

try:
    import fcntl
except ImportError:  # Windows, where files of dead processes stay until they are removed by hand
    fcntl = None  # type: ignore[assignment]

PREFIX = "knowledge-rows-"
"""How the names of files begin that belong to a running process."""

ROWS_PER_BLOCK = 1 << 16
"""Number of rows that are read and written at a time."""
_BYTES_PER_VALUE = 2
# The header of NumPy's format leaves room for any number of rows, so it can be written before that is known.
_HEADER_BYTES = 128
_ABANDONED_SECONDS = 3600.0


class RowFileError(RuntimeError):
    """A file of rows is missing, cut short or of another kind."""


class RowFile:
    """One table of rows in a file.

    Attributes:
        path: The file, of NumPy's format.
        shape: `(N, d)`.

    Args:
        path: The file, as `PairWriter` makes it.

    Raises:
        RowFileError: The file is missing, cut short or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as stream:
                version = numpy_format.read_magic(stream)
                if version != (1, 0):
                    raise ValueError(f"its version is {version}")
                shape, is_fortran, dtype = numpy_format.read_array_header_1_0(stream)
                start, size = stream.tell(), os.fstat(stream.fileno()).st_size
            if is_fortran or dtype != np.float16 or len(shape) != 2 or start != _HEADER_BYTES:
                raise ValueError(f"it holds {dtype} of shape {shape}")
            if size != start + shape[0] * shape[1] * _BYTES_PER_VALUE:
                raise ValueError(f"it has {size} bytes, which are not those of {shape[0]} rows of {shape[1]}")
        except (OSError, ValueError) as error:
            raise RowFileError(f"The rows {path} cannot be read: {error}.") from error
        self.shape: tuple[int, int] = shape

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def mapped(self) -> Tensor:
        """All rows, `(N, d)` float16, read by the system when they are touched; they must not be written."""
        if len(self) == 0:
            return torch.empty(self.shape, dtype=torch.float16)
        array = np.memmap(self.path, np.float16, "r", _HEADER_BYTES, self.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(array)

    @cached_property
    def _scattered(self) -> Tensor:
        """The rows in a mapping of their own, from which the system reads no more than what is touched."""
        array = np.memmap(self.path, np.float16, "r", _HEADER_BYTES, self.shape)
        if hasattr(mmap, "MADV_RANDOM"):
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(array)

    def read(self, rows: Tensor) -> Tensor:
        """Read some rows.

        Args:
            rows: `(n,)` int64, best in ascending order.

        Returns:
            `(n, d)` float16 on the CPU.
        """
        return self._scattered[rows.cpu()]

    def blocks(self, height: int = ROWS_PER_BLOCK) -> Iterator[tuple[int, Tensor]]:
        """Read all rows in order, without leaving them in this process's memory.

        Args:
            height: Number of rows at a time.

        Yields:
            The number of a first row, and the rows from it on, `(height, d)` float16.
        """
        width = self.shape[1]
        with open(self.path, "rb") as stream:
            stream.seek(_HEADER_BYTES)
            for first in range(0, len(self), height):
                count = min(height, len(self) - first)
                block = torch.empty(count, width, dtype=torch.float16)
                if stream.readinto(block.numpy().data.cast("B")) != block.nbytes:
                    raise RowFileError(f"The rows {self.path} were cut short while they were read.")
                yield first, block

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Write some rows in place; all who have mapped the file see them.

        Args:
            rows: `(n,)` int64, on the CPU.
            values: `(n, d)`.

        Raises:
            OSError: The file cannot be written.
        """
        size = self.shape[1] * _BYTES_PER_VALUE
        with open(self.path, "r+b", buffering=0) as stream:
            for row, value in zip(rows.tolist(), values.to("cpu", torch.float16).numpy(), strict=True):
                stream.seek(_HEADER_BYTES + row * size)
                stream.write(value.tobytes())

    def link_to(self, path: Path) -> None:
        """Give the file a second name, or copy it where the file system has no such names.

        Args:
            path: The other name; a file of that name is replaced, whole or not at all.

        Raises:
            OSError: The name cannot be made or the disk is full.
        """
        with atomic_write(path) as temporary:
            try:
                os.link(self.path, temporary)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSPC):
                    raise
                shutil.copyfile(self.path, temporary)

    @property
    def is_shared(self) -> bool:
        """Whether the file has another name, such as that of a snapshot, whose rows must stay as they are."""
        return self.path.stat().st_nlink > 1


@dataclass(frozen=True)
class PairFiles:
    """The audio rows and the text rows of pairs in two files.

    Attributes:
        audio: The audio rows.
        text: The text rows; row j of both is pair j.
        is_own: Whether they are this process's, which may write into them.
    """

    audio: RowFile
    text: RowFile
    is_own: bool = False

    def __post_init__(self) -> None:
        if self.audio.shape != self.text.shape:
            raise RowFileError(
                f"{self.audio.path} and {self.text.path} are no pairs: {self.audio.shape}, {self.text.shape}."
            )

    @classmethod
    def open(cls, stem: Path) -> PairFiles:
        """Open the files that `paths_of` names.

        Args:
            stem: The common part of both paths.

        Raises:
            RowFileError: A file is missing, cut short or of another kind.
        """
        audio, text = paths_of(stem)
        return cls(RowFile(audio), RowFile(text))

    @property
    def may_be_changed(self) -> bool:
        """Whether nobody else relies on what they hold, such as a snapshot that shares them."""
        return self.is_own and not any(side.is_shared for side in self.sides)

    @property
    def sides(self) -> tuple[RowFile, RowFile]:
        """Both files."""
        return self.audio, self.text

    @property
    def num_bytes(self) -> int:
        """What the rows take on the disk."""
        return 2 * self.audio.shape[0] * self.audio.shape[1] * _BYTES_PER_VALUE

    def checksums(self, numbers: Tensor | None = None) -> tuple[int, int]:
        """The `checksum` of the audio and of the text rows, by reading them once.

        Args:
            numbers: `(N,)`, the numbers of the rows in the whole table; default: 0 … N - 1.
        """
        if numbers is None:
            numbers = torch.arange(len(self.audio))
        audio, text = (
            sum(checksum(block, numbers[first : first + len(block)]) for first, block in side.blocks())
            % 2**64
            for side in self.sides
        )
        return audio, text

    def link_to(self, stem: Path) -> None:
        """Give both files second names, see `RowFile.link_to` and `paths_of`."""
        for side, path in zip(self.sides, paths_of(stem), strict=True):
            side.link_to(path)


def paths_of(stem: Path) -> tuple[Path, Path]:
    """The paths of the audio rows and of the text rows that share a stem.

    Examples:
        >>> [path.name for path in paths_of(Path("base"))]
        ['base.audio.npy', 'base.text.npy']
    """
    return stem.with_name(f"{stem.name}.audio.npy"), stem.with_name(f"{stem.name}.text.npy")


class PairWriter:
    """Writes pairs into two new files, in a directory that other runs may use as well.

    The files belong to this process: they are removed when the last user of the pairs has gone, at the end of
    the process, and, should that be killed, by the next writer in the same directory.

    Args:
        directory: The directory; made if need be.
        num_rows: N, if it is known, by which a disk that is too full is noticed at the first row.

    Raises:
        OSError: The directory cannot be made or written to, or the disk is full.
    """

    def __init__(self, directory: Path, num_rows: int | None = None) -> None:
        self.directory = directory
        self._num_rows = num_rows
        self._count = 0
        self._width: int | None = None
        self.stem = directory / f"{PREFIX}{uuid4().hex}"
        paths = paths_of(self.stem)
        self._streams: list[IO[bytes]] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_abandoned(directory)
            for path in paths:
                stream = open(path, "xb")  # noqa: SIM115
                self._streams.append(stream)
                if fcntl is not None:
                    fcntl.flock(stream, fcntl.LOCK_SH)
        except OSError as error:
            self._streams_closed()
            raise self._explained(error) from error
        # The streams hold the locks that say that the files are in use.
        self._release = weakref.finalize(self, _remove, paths, self._streams, os.getpid())

    def append(self, audio: Tensor, text: Tensor) -> None:
        """Write pairs behind those before.

        Args:
            audio: `(n, d)`, on any device; normalised here.
            text: `(n, d)`, normalised here, too.

        Raises:
            OSError: The disk is full.
        """
        self.append_stored(*(unit_length(side.detach().float()).half() for side in (audio, text)))

    def append_stored(self, audio: Tensor, text: Tensor) -> None:
        """Write pairs that have been stored before, as they are.

        Args:
            audio: `(n, d)` float16 unit vectors.
            text: `(n, d)` float16 unit vectors.

        Raises:
            OSError: The disk is full.
        """
        try:
            self._begin(audio.shape[1])
            for stream, side in zip(self._streams, (audio, text), strict=True):
                stream.write(side.cpu().contiguous().numpy().data)
        except OSError as error:
            self._release()
            raise self._explained(error) from error
        self._count += len(audio)

    def _begin(self, width: int) -> None:
        """Write the headers, unless they are there, and notice a disk that is too full."""
        if self._width is not None:
            return
        self._width = width
        needed = 2 * _BYTES_PER_VALUE * width * (self._num_rows or 0)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        for stream in self._streams:
            stream.write(_header(0, width))

    def finish(self, width: int | None = None) -> PairFiles:
        """End the files; they live as long as the result.

        Args:
            width: d, for files without rows.

        Raises:
            OSError: The disk is full.
        """
        try:
            self._begin(width or 0)
            for stream in self._streams:
                stream.seek(0)
                stream.write(_header(self._count, self._width or 0))
                stream.flush()
        except OSError as error:
            self._release()
            raise self._explained(error) from error
        audio, text = map(RowFile, paths_of(self.stem))
        files = PairFiles(audio, text, is_own=True)
        self._release.detach()
        weakref.finalize(files, _remove, paths_of(self.stem), self._streams, os.getpid())
        return files

    def _streams_closed(self) -> None:
        for stream in self._streams:
            stream.close()
            with contextlib.suppress(OSError):
                os.unlink(stream.name)

    def _explained(self, error: OSError) -> OSError:
        """An error with what to do."""
        return OSError(
            error.errno,
            f"The rows of the knowledge cannot be written to {self.directory} ({error.strerror or error}). "
            "Name a local directory with enough space and the right to write: "
            'KnowledgeRefreshCallback(storage="memmap", storage_directory=...)',
        )


def copy_pairs(source: PairFiles, directory: Path) -> PairFiles:
    """Copy pairs into new files of this process.

    Args:
        source: The pairs.
        directory: The directory of the new files.

    Raises:
        OSError: The disk is full.
    """
    writer = PairWriter(directory, len(source.audio))
    for (_, audio), (_, text) in zip(source.audio.blocks(), source.text.blocks(), strict=True):
        writer.append_stored(audio, text)
    return writer.finish(source.audio.shape[1])


def remove_abandoned(directory: Path) -> None:
    """Remove the files of processes that were killed: of a certain age, and that nobody has locked."""
    if fcntl is None:
        return
    for path in directory.glob(f"{PREFIX}*.npy"):
        with contextlib.suppress(OSError):  # in use, or another process is faster
            if time.time() - path.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            with open(path, "rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _header(rows: int, width: int) -> bytes:
    """The header of NumPy's format."""
    stream = BytesIO()
    described = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
    numpy_format.write_array_header_1_0(stream, described)
    header = stream.getvalue()
    assert len(header) == _HEADER_BYTES, len(header)
    return header


def _remove(paths: tuple[Path, Path], streams: list[IO[bytes]], process: int) -> None:
    """Remove the files of this process; copies of it, such as workers of a loader, leave them alone."""
    if os.getpid() != process:
        return
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.close()
