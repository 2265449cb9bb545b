"""Whether the data of a task are those that its finished runs were trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch.utils.data import Dataset

from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.encoding.source_identity import dataset_of, source_key


def data_checksum(datasets: Mapping[str, Dataset[Any]]) -> str:
    """A checksum of datasets, without decoding audio.

    Of the datasets of audio files it is one of clips, captions, and size and time of the files; of others, of
    their class, their length, and the tensors and texts that are public attributes.

    Args:
        datasets: Datasets by name.

    Returns:
        16 hexadecimal digits.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> one, other = ({"train": TensorDataset(torch.full((2,), value))} for value in (0.0, 1.0))
        >>> data_checksum(one) == data_checksum(one), data_checksum(one) == data_checksum(other)
        (True, False)
    """
    digest = blake2b(digest_size=8)
    for name in sorted(datasets):
        for part in (name.encode(), *_parts(datasets[name])):
            digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


def _parts(dataset: Any) -> Iterator[bytes]:
    """What tells two datasets apart."""
    yield str(source_key(dataset)).encode()
    whole: Any = dataset_of(dataset)
    if isinstance(whole, ClipDataset):
        for clip in whole.clips:
            path, place = whole.origin(clip)
            state = path.stat()
            yield f"{clip} {place} {state.st_size} {state.st_mtime_ns}".encode(errors="surrogatepass")
        return
    for name, value in sorted(getattr(whole, "__dict__", {}).items()):
        if not name.startswith("_"):  # such as audio that was rendered on this machine
            yield name.encode()
            yield from _bytes_of(value)


def _bytes_of(value: object) -> Iterator[bytes]:
    """Tensors and texts, also of lists; nothing of other values."""
    if isinstance(value, torch.Tensor):
        yield str((value.dtype, tuple(value.shape))).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, str):
        yield value.encode(errors="surrogatepass")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _bytes_of(part)
