"""Texts as bytes with the places where each ends, of which only those are decoded that are asked for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from ask_lightning.utilities.case_folding import fold_case

_BLOCK = 1 << 16
_SCANNED = 1 << 10
# What is no Unicode, such as a file name of another encoding, comes back as it was.
_ENCODING = ("utf-8", "surrogatepass")


class StoredTexts(Sequence[str]):
    """Texts that may lie in a file mapped into memory.

    Args:
        content: The texts one after another, in UTF-8, uint8.
        ends: Place behind the last byte of each text, `(n,)` int64, rising.

    Raises:
        ValueError: The two do not belong together.

    Examples:
        >>> texts = StoredTexts.of(["a dog", "", "häuser"])
        >>> texts[2], texts[:2], len(texts), texts == ["a dog", "", "häuser"]
        ('häuser', ['a dog', ''], 3, True)
    """

    def __init__(self, content: Tensor, ends: Tensor) -> None:
        if (int(ends[-1]) if len(ends) else 0) != len(content):
            raise ValueError("The texts are not as long as they are said to be.")
        self.content, self.ends = content, ends
        self._bytes = content.numpy().data

    @classmethod
    def of(cls, texts: Iterable[str]) -> "StoredTexts":
        """Store texts in memory.

        Args:
            texts: The texts.
        """
        if isinstance(texts, cls):
            return texts
        encoded = [text.encode(*_ENCODING) for text in texts]
        content = (
            torch.frombuffer(bytearray(joined), dtype=torch.uint8) if (joined := b"".join(encoded)) else None
        )
        ends = torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0)
        return cls(torch.empty(0, dtype=torch.uint8) if content is None else content, ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self.ends[place - 1]) if place else 0
        return self._decode(start, int(self.ends[place]))

    def __iter__(self) -> Iterator[str]:
        start = 0
        for block in self.ends.split(_BLOCK):
            for end in block.tolist():
                yield self._decode(start, end)
                start = end

    def containing(self, words: str) -> Tensor:
        """Which texts contain others, whatever the case.

        Args:
            words: What is looked for, as `fold_case` returns it.

        Returns:
            `(n,)` bool.
        """
        found = torch.zeros(len(self), dtype=torch.bool)
        start = first = 0
        for block in self.ends.split(_SCANNED):
            if not (ends := block.tolist()):  # the one block of no texts
                break
            # Most blocks do not contain rare words, and are decoded as a whole.
            if words in fold_case(self._decode(start, ends[-1])):
                for row, end in enumerate(ends, first):
                    found[row] = words in fold_case(self._decode(start, end))
                    start = end
            start, first = ends[-1], first + len(ends)
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}.of({list(self)!r})"

    def _decode(self, start: int, end: int) -> str:
        return str(self._bytes[start:end], *_ENCODING)
