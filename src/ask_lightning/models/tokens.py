"""Captions to token ids, with a vocabulary or without. Axes: `B` batch, `L` tokens."""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ask_lightning.models.weights import load_from_transformers
from ask_lightning.models.words import split_words
from ask_lightning.utilities.arguments import check_choice, check_count
from ask_lightning.utilities.optional_imports import import_optional

TOKENIZER_FILE = "tokenizer.json"
"""Name of the file of a tokenizer of transformers, in a folder of its own or of a model."""

# With which multilingual tokenizers mark the language of a text, such as `eng_Latn`.
_LANGUAGE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_REMEDY = (
    'Pass a folder or hub name with a tokenizer, or `tokenizer="hashed"` for one that needs no file and fits '
    "no pretrained weights."
)


class Tokenizer(nn.Module, ABC):
    """Base class of tokenizers, which turn captions into token ids.

    Args:
        kind: Value of the argument `tokenizer` that makes a model into which this tokenizer's state dict can
            be loaded.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    @abstractmethod
    def forward(self, captions: Sequence[str], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Tokenize captions.

        Args:
            captions: `B` captions.
            device: Device of the result.

        Returns:
            Token ids and mask, `(B, L)` int64 each; the mask is 0 where a shorter caption is padded.
        """


class HashedTokenizer(Tokenizer):
    """Hashes words to ids: it needs no vocabulary and no file, and is the same in every process and version.

    It serves text encoders with random weights. Different words can share an id; the larger the vocabulary,
    the fewer do.

    Args:
        vocab_size: Number of ids, at least 8.
        pad_id: Id of the padding, at most 2; words never have it.
        max_tokens: Largest number of tokens of a caption. Longer captions are truncated.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> ids, mask = HashedTokenizer(vocab_size=1000)(["Rain", "rain, then wind"])
        >>> ids.shape, mask.tolist()
        (torch.Size([2, 5]), [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        >>> ids[0, 1] == ids[1, 1]
        tensor(True)
    """

    _RESERVED = 3

    def __init__(self, vocab_size: int, pad_id: int = 0, max_tokens: int = 128) -> None:
        super().__init__("hashed")
        check_count("vocab_size", vocab_size, 8)
        check_choice("pad_id", pad_id, tuple(range(self._RESERVED)))
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.max_tokens = max_tokens
        self.start_id = 1 if pad_id == 0 else 0

    def forward(self, captions: Sequence[str], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Tokenize captions. A caption without a word becomes a single start token.

        Args:
            captions: `B` captions.
            device: Device of the result.

        Returns:
            Token ids and mask, `(B, L)` int64 each; the mask is 0 where a shorter caption is padded.
        """
        rows = [self._token_ids(caption) for caption in captions]
        length = max(map(len, rows))
        ids = [row + [self.pad_id] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _token_ids(self, caption: str) -> list[int]:
        buckets = self.vocab_size - self._RESERVED
        words = split_words(caption)[: self.max_tokens - 1]
        return [self.start_id] + [zlib.crc32(word.encode()) % buckets + self._RESERVED for word in words]


class VocabularyTokenizer(Tokenizer):
    """A tokenizer of transformers that travels with the weights of its model.

    The state dict holds it, compressed, as a tensor of bytes: a checkpoint of the model loads without the
    folder or the hub repository that the vocabulary came from.

    Args:
        max_tokens: Largest number of tokens of a caption. Longer captions are truncated.
        language: Code of the captions' language, which has to be that of the vocabulary that is loaded, if it
            is a multilingual one.

    Examples:
        >>> VocabularyTokenizer()(["rain"])
        Traceback (most recent call last):
        ...
        RuntimeError: The tokenizer has no vocabulary yet: with `tokenizer="checkpoint"` it comes with the \
state dict of a trained model. Load that first.
    """

    def __init__(self, max_tokens: int = 128, language: str | None = None) -> None:
        super().__init__("checkpoint")
        self.max_tokens = max_tokens
        self._language = language
        self._backend: Any = None

    @classmethod
    def from_source(
        cls, source: str, max_tokens: int = 128, *, language: str | None = None
    ) -> "VocabularyTokenizer":
        """Load a tokenizer of transformers.

        Args:
            source: Path of a folder, or name of a repository on the Hugging Face hub.
            max_tokens: Largest number of tokens of a caption. Longer captions are truncated.
            language: Code of the captions' language, such as `"eng_Latn"`, for multilingual tokenizers.

        Raises:
            FileNotFoundError: The tokenizer was not found.
            ValueError: The tokenizer has no fast version, or does not know the language.
        """
        transformers = import_optional("transformers")
        loaded = load_from_transformers(
            transformers.AutoTokenizer, source, argument="tokenizer", remedy=_REMEDY, kind="tokenizer"
        )
        if not hasattr(loaded, "backend_tokenizer"):
            raise ValueError(
                f"Argument `tokenizer` has to name a tokenizer with a fast version, but {source!r} is a "
                f"{type(loaded).__name__}. Save its folder anew with a `tokenizer.json`."
            )
        if language is not None and hasattr(loaded, "src_lang"):
            if loaded.convert_tokens_to_ids(language) in (None, loaded.unk_token_id):
                raise ValueError(
                    f"Argument `language` has to be a language code that the tokenizer of {source!r} knows, "
                    f"such as 'eng_Latn', but got {language!r}."
                )
            loaded.src_lang = language
        tokenizer = cls(max_tokens)
        # A copy: padding and truncation are settings of the object.
        backend = type(loaded.backend_tokenizer).from_str(loaded.backend_tokenizer.to_str())
        backend.enable_truncation(max_tokens)
        backend.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
        tokenizer._backend = backend
        return tokenizer

    @property
    def num_ids(self) -> int:
        """One more than the largest id; 0 while there is no vocabulary."""
        return 0 if self._backend is None else max(self._backend.get_vocab().values()) + 1

    def forward(self, captions: Sequence[str], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Tokenize captions.

        Args:
            captions: `B` captions.
            device: Device of the result.

        Returns:
            Token ids and mask, `(B, L)` int64 each; the mask is 0 where a shorter caption is padded.

        Raises:
            RuntimeError: There is no vocabulary yet.
        """
        self._check_vocabulary()
        rows = self._backend.encode_batch(list(captions))
        ids = torch.tensor([row.ids for row in rows], device=device)
        return ids, torch.tensor([row.attention_mask for row in rows], device=device)

    def save_files(self, folder: Path) -> None:
        """Write the tokenizer as files that `transformers.AutoTokenizer` loads.

        Args:
            folder: Folder that exists. `tokenizer.json` is the whole tokenizer, and what `load_file` reads.

        Raises:
            RuntimeError: There is no vocabulary yet.
        """
        self._check_vocabulary()
        self.as_transformers().save_pretrained(folder)
        # transformers leaves out how far captions are truncated and padded.
        (folder / TOKENIZER_FILE).write_text(self._backend.to_str(), encoding="utf-8")

    def load_file(self, folder: Path) -> None:
        """Read the tokenizer that `save_files` wrote; captions are truncated to this one's `max_tokens`.

        Args:
            folder: Folder with a file `tokenizer.json`.

        Raises:
            FileNotFoundError: There is no such file.
        """
        self._restore((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))

    def as_transformers(self) -> Any:
        """The tokenizer as one of transformers, for its processors.

        Raises:
            RuntimeError: There is no vocabulary yet.
        """
        self._check_vocabulary()
        return import_optional("transformers").PreTrainedTokenizerFast(
            tokenizer_object=type(self._backend).from_str(self._backend.to_str()),
            pad_token=self._backend.padding["pad_token"],
            model_max_length=self._backend.truncation["max_length"],
            # Encoders of text are called with these alone.
            model_input_names=["input_ids", "attention_mask"],
        )

    def _check_vocabulary(self) -> None:
        if self._backend is None:
            raise RuntimeError(
                'The tokenizer has no vocabulary yet: with `tokenizer="checkpoint"` it comes with the state '
                "dict of a trained model. Load that first."
            )

    def get_extra_state(self) -> Tensor:
        """The tokenizer as a compressed tensor of bytes."""
        text = "" if self._backend is None else self._backend.to_str()
        return torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore a tokenizer; captions are truncated to this one's `max_tokens`.

        Args:
            state: Bytes that `get_extra_state` returned.

        Raises:
            ValueError: It marks captions as another language than that of this tokenizer.
        """
        text = zlib.decompress(state.cpu().numpy().tobytes()).decode()
        if text:
            self._restore(text)

    def _restore(self, text: str) -> None:
        backend = import_optional("tokenizers").Tokenizer.from_str(text)
        marks = [token for token in backend.encode("").tokens if _LANGUAGE.fullmatch(token)]
        if self._language is not None and marks and self._language not in marks:
            raise ValueError(
                f"Argument `language` cannot be changed to {self._language!r}: the tokenizer beside the "
                f"weights marks captions as {marks[0]!r}. Train a model that was made with your language."
            )
        self._backend = backend
        self._backend.enable_truncation(self.max_tokens)  # perhaps another one than it was written with


def make_tokenizer(
    tokenizer: str | None,
    weights: str | None,
    config: Any,
    *,
    max_tokens: int,
    language: str | None = None,
) -> Tokenizer:
    """Make the tokenizer of a text encoder.

    Args:
        tokenizer: Folder or hub name of the tokenizer. None: the tokenizer of `weights`. `"hashed"`: a
            `HashedTokenizer`. `"checkpoint"`: a `VocabularyTokenizer` whose vocabulary is loaded later.
        weights: Folder or hub name of the text encoder. None: its weights are random.
        config: Configuration of the text encoder, of transformers.
        max_tokens: Largest number of tokens of a caption, at least 3. Longer captions are truncated, to the
            number of positions of the encoder if that is smaller.
        language: Code of the captions' language, for multilingual tokenizers.

    Raises:
        FileNotFoundError: The tokenizer was not found.
        ValueError: No tokenizer is named, it does not fit the encoder, or `max_tokens` is below 3.
    """
    check_count("max_tokens", max_tokens, 3)
    source = tokenizer or weights
    if source is None:
        raise ValueError(
            f"Argument `tokenizer` has to be given for a text encoder with random weights. {_REMEDY}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        # Some encoders count positions from the padding id on.
        max_tokens = min(max_tokens, positions - (config.pad_token_id or 0) - 1)
    if source == "hashed":
        return HashedTokenizer(config.vocab_size, config.pad_token_id or 0, max_tokens)
    if source == "checkpoint":
        return VocabularyTokenizer(max_tokens, language)
    loaded = VocabularyTokenizer.from_source(source, max_tokens, language=language)
    if loaded.num_ids > config.vocab_size:
        raise ValueError(
            f"Argument `tokenizer` has to fit the text encoder, but {source!r} has ids up to "
            f"{loaded.num_ids - 1}, and the encoder a vocabulary of {config.vocab_size}."
        )
    return loaded
