"""A text encoder without a vocabulary file. Axes: `B` batch, `W` words, `P` pieces, `d` width."""

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_PIECE_LENGTHS = (3, 4)


def word_pieces(word: str) -> list[str]:
    """The word itself and all its runs of three and four characters, with both ends marked.

    Args:
        word: Word in upper or lower case.

    Examples:
        >>> word_pieces("Dog")
        ['<dog>', '<do', 'dog', 'og>', '<dog', 'dog>']
    """
    marked = f"<{word.lower()}>"
    return [marked] + [
        marked[start : start + length]
        for length in _PIECE_LENGTHS
        for start in range(len(marked) - length + 1)
        if length < len(marked)
    ]


def split_words(caption: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case.

    Args:
        caption: Text of any length.

    Examples:
        >>> split_words("Rain, then wind")
        ['rain', ',', 'then', 'wind']
    """
    return _WORD.findall(caption.lower())


class HashedWordEncoder(nn.Module):
    """Encodes captions: hashed word pieces, a recurrent network over words, its maximum.

    Pieces are hashed into a fixed number of buckets, as in fastText: no vocabulary is fitted to the captions,
    related forms ("ring", "ringing") share pieces, and unknown words have pieces as well. The hash is the
    same in every process and version. The recurrent network makes the embedding depend on the order of
    words: "rain, then wind" differs from "wind, then rain".

    Args:
        width: d, width of the output.
        num_buckets: Number of piece embeddings.
        word_width: Width of a word's embedding and of each direction of the recurrent network.

    Examples:
        >>> encoder = HashedWordEncoder(width=8)
        >>> encoder(["rain, then wind", "wind"]).shape
        torch.Size([2, 8])
    """

    def __init__(self, width: int, num_buckets: int = 4096, word_width: int = 64) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.pieces = nn.EmbeddingBag(num_buckets, word_width, mode="mean")
        self.recurrent = nn.GRU(word_width, word_width, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * word_width, width)
        self._buckets_of_word: dict[str, list[int]] = {}

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Encode captions.

        Args:
            captions: `B` captions with at least one word or punctuation mark each.

        Returns:
            `(B, width)`, not normalised.

        Raises:
            ValueError: A caption has no word.
        """
        states, _ = self._states(captions)
        projected: Tensor = self.project(states.amax(dim=1))  # (B, width)
        return projected

    def with_tokens(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode captions, and each of their words.

        Args:
            captions: `B` captions with at least one word or punctuation mark each.

        Returns:
            Captions `(B, width)` and their words `(B, W, width)`, not normalised, and which of them are no
            padding, `(B, W)` boolean.

        Raises:
            ValueError: A caption has no word.
        """
        states, inside = self._states(captions)
        words = self.project(states.masked_fill(~inside.unsqueeze(-1), 0))  # (B, W, width)
        return self.project(states.amax(dim=1)), words, inside

    def _states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States of the words `(B, W, 2 word_width)`, -inf in padding, and which are no padding."""
        sentences = [split_words(caption) for caption in captions]
        for caption, words in zip(captions, sentences, strict=True):
            if not words:
                raise ValueError(f"A caption has to hold at least one word, but got {caption!r}.")
        lengths = torch.tensor([len(words) for words in sentences])  # (B,)
        vectors = self.pieces(*self._pieces(sentences))  # (sum of lengths, word_width)
        padded = pad_sequence(vectors.split(lengths.tolist()), batch_first=True)  # (B, W, word_width)
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, padding_value=-torch.inf
        )  # (B, W, 2 word_width)
        inside = torch.arange(states.shape[1]) < lengths.unsqueeze(1)  # (B, W)
        return states, inside.to(states.device)

    def _pieces(self, sentences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Buckets of all pieces of all words, concatenated, and the position at which each word starts."""
        buckets: list[int] = []
        starts: list[int] = []
        for words in sentences:
            for word in words:
                starts.append(len(buckets))
                buckets += self._buckets(word)
        device = self.pieces.weight.device
        return torch.tensor(buckets, device=device), torch.tensor(starts, device=device)

    def _buckets(self, word: str) -> list[int]:
        """Buckets of the pieces of a word."""
        if word not in self._buckets_of_word:
            self._buckets_of_word[word] = [
                zlib.crc32(piece.encode()) % self.num_buckets for piece in word_pieces(word)
            ]
        return self._buckets_of_word[word]
