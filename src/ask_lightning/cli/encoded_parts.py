"""Parts of a split that is being encoded, on disk until the whole is written.

A part is some batches that follow each other. It is written whole or not at all, and says of which work it
is a part, so that a run that was killed goes on from the parts that are there.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ask_lightning.cli.errors import UsageError
from ask_lightning.cli.stored_texts import StoredTexts
from ask_lightning.utilities.atomic_files import atomic_write, remove_abandoned

_ENDING = ".safetensors"
_MOST_BATCHES = 64
_WANTED_PARTS = 64


def batches_of_parts(num_batches: int) -> list[range]:
    """Divide batches into parts, in a way that depends on their number alone.

    Whoever goes on with the work may have more or fewer processes than whoever began it. There are enough
    parts for several processes to have equally many, and not so many that writing them takes long.

    Args:
        num_batches: Number of batches, at least 0.

    Returns:
        The numbers of the batches of each part: at most 64 batches, and up to 4096 batches at most 64 parts.

    Examples:
        >>> batches_of_parts(3)
        [range(0, 1), range(1, 2), range(2, 3)]
        >>> batches_of_parts(150)[-1]
        range(147, 150)
    """
    size = min(_MOST_BATCHES, max(1, -(-num_batches // _WANTED_PARTS)))
    return [range(first, min(first + size, num_batches)) for first in range(0, num_batches, size)]


@dataclass(frozen=True)
class EncodedParts:
    """The folder with the parts of one split.

    Attributes:
        folder: The folder, which need not exist.
        identity: Text that two parts share only if the same model encodes the same data in the same way.
    """

    folder: Path
    identity: str

    def find(self) -> set[int]:
        """The numbers of the parts that are there, complete and of this identity."""
        return {int(path.name[5:13]) for path in self.folder.glob(f"part-*{_ENDING}") if self._is_own(path)}

    def remove_others(self) -> int:
        """Remove parts of another identity, damaged ones, and what killed processes have left.

        Returns:
            The number of parts that were removed.

        Raises:
            OSError: A file cannot be removed.
        """
        others = [path for path in self.folder.glob(f"part-*{_ENDING}") if not self._is_own(path)]
        for path in others:
            path.unlink()
        remove_abandoned(self.folder)
        return len(others)

    def write(self, number: int, tensors: dict[str, Tensor], captions: list[str]) -> None:
        """Write a part.

        Args:
            number: Number of the part.
            tensors: The tensors by name, none of which is `"captions"` or `"captions_ends"`.
            captions: Captions of the pairs.

        Raises:
            UsageError: The file cannot be written.
        """
        path = self._path(number)
        texts = StoredTexts.of(captions)
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        stored |= {"captions": texts.content, "captions_ends": texts.ends}
        try:
            with atomic_write(path) as temporary:
                save_file(stored, temporary, metadata={"identity": self.identity})
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} cannot be written: {error}") from error

    def read(self, number: int) -> tuple[dict[str, Tensor], StoredTexts]:
        """Read a part.

        Args:
            number: Number of the part.

        Returns:
            Its tensors by name, and its captions.

        Raises:
            OSError: The file is missing or cannot be read.
            SafetensorError: The file is damaged.
        """
        with safe_open(self._path(number), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return tensors, StoredTexts(tensors.pop("captions"), tensors.pop("captions_ends"))

    def remove(self) -> None:
        """Remove all parts, and the folder if nothing else is in it."""
        for path in self.folder.glob(f"part-*{_ENDING}"):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}{_ENDING}"

    def _is_own(self, path: Path) -> bool:
        """Whether a file is complete, which opening it checks, and of this identity."""
        try:
            with safe_open(path, framework="pt") as stored:
                return bool((stored.metadata() or {}).get("identity") == self.identity)
        except (SafetensorError, OSError):
            return False
