"""A cache of decoded audio, in memory or in a folder."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ask_lightning.utilities.atomic_files import written_whole

_FORMAT = 1  # to be raised when decoding or log_mel changes, so that older caches are not taken for new


class AudioCache:
    """Remembers what was computed from a file, for as long as the file and the settings stay the same.

    Args:
        place: None: remember nothing. `"memory"`: in this process; each worker of a loader has its own.
            Any other text or path: a folder, made if missing, that any number of processes can share.

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
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def active(self) -> bool:
        """Whether anything is remembered."""
        return self._memory is not None or self._folder is not None

    def get(
        self, path: Path, settings: str, compute: Callable[[], Tensor], *, mapped: bool = False
    ) -> Tensor:
        """What `compute` returns, or returned before for this file and these settings.

        Args:
            path: The file that the result is computed from; its time and size are part of the key.
            settings: Everything else that the result depends on.
            compute: Makes the float32 tensor.
            mapped: Whether to leave a tensor of the folder on disk until its parts are used, for those
                who need a part only.

        Returns:
            The tensor. Do not write into it.
        """
        if not self.active:
            return compute()
        key = _key(path, settings)
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
        with written_whole(stored, flush=False) as temporary, temporary.open("wb") as file:
            np.save(file, value.numpy(), allow_pickle=False)
        return value


def _key(path: Path, settings: str) -> str:
    state = path.stat()
    parts = f"{_FORMAT}\n{path.resolve()}\n{state.st_mtime_ns}\n{state.st_size}\n{settings}"
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
