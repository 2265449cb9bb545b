"""A cache of decoded audio, in memory or in a folder."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ask_lightning.utilities.atomic_files import atomic_write, remove_abandoned

_FORMAT = 3  # raise this when decoding or `log_mel` changes, so that older files are not used


class AudioCache:
    """Keeps what was computed from a file, for as long as the file and the settings stay the same.

    Args:
        place: Where results are kept. None: nowhere. `"memory"`: in this process; each worker of a loader has
            a cache of its own. Any other text or path: a folder, made if missing, that processes share.

    Raises:
        OSError: The folder cannot be made.

    Examples:
        >>> cache = AudioCache("memory")
        >>> path = getfixture("tmp_path") / "a.raw"
        >>> _ = path.write_bytes(b"12")
        >>> cache.get(path, "settings", lambda: torch.ones(2))
        tensor([1., 1.])
        >>> cache.get(path, "settings", lambda: torch.zeros(2))
        tensor([1., 1.])
    """

    def __init__(self, place: Literal["memory"] | str | Path | None) -> None:
        self._memory: dict[str, Tensor] | None = {} if place == "memory" else None
        self._folder = None if place in (None, "memory") else Path(place)
        self._has_looked_for_abandoned = False
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(
                    f'Argument `cache` has to be None, "memory" or a folder that can be made, but got '
                    f"{str(place)!r} ({error.strerror})."
                ) from error

    @property
    def active(self) -> bool:
        """Whether results are kept."""
        return self._memory is not None or self._folder is not None

    def get(
        self, path: Path, settings: str, compute: Callable[[], Tensor], *, mapped: bool = False
    ) -> Tensor:
        """The result of `compute`, from the cache if it was computed before for this file and settings.

        Args:
            path: Path of the file that the result is computed from. Its time of change and its size are part
                of the cache's key.
            settings: Text that names everything else that the result depends on.
            compute: Function that returns the float32 tensor.
            mapped: Whether to map a stored tensor into memory instead of reading it, for callers that need
                only a part of it.

        Returns:
            The tensor, which has to stay unchanged.
        """
        if not self.active:
            return compute()
        key = _cache_key(path, settings)
        if self._memory is not None:
            if key not in self._memory:
                self._memory[key] = compute()
            return self._memory[key]
        assert self._folder is not None
        stored = self._folder / f"{key}.npy"
        try:
            # "c" for a map that may be written to, as torch wants it, but never is.
            return torch.from_numpy(np.load(stored, mmap_mode="c" if mapped else None, allow_pickle=False))
        except FileNotFoundError:
            pass
        except (ValueError, EOFError):
            pass  # cut short by a full disk or a copy that was interrupted: written anew below
        value = compute()
        if not self._has_looked_for_abandoned:  # once, since a folder may hold very many files
            self._has_looked_for_abandoned = True
            remove_abandoned(self._folder)
        content = io.BytesIO()  # for NumPy does not say why a file could not be written
        np.save(content, value.numpy(), allow_pickle=False)
        with atomic_write(stored, flush=False) as temporary:
            temporary.write_bytes(content.getbuffer())
        return value


def _cache_key(path: Path, settings: str) -> str:
    state = path.stat()
    parts = f"{_FORMAT}\n{path.resolve()}\n{state.st_mtime_ns}\n{state.st_size}\n{settings}"
    return hashlib.blake2b(parts.encode(errors="surrogateescape"), digest_size=16).hexdigest()
