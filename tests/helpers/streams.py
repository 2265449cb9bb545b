"""The pairs of `Pairs` as streams: shards of WebDataset, chunks of litdata."""

from pathlib import Path

import torch

from tests.helpers.clients import Pairs


def write_shards(directory: Path, size: int = 44, num_shards: int = 4) -> list[str]:
    """Tar files of numbered pairs; shard s has the rows from size · s / num_shards on."""
    import webdataset

    directory.mkdir(parents=True, exist_ok=True)
    pairs, paths = Pairs(size), []
    for shard in range(num_shards):
        paths.append(str(directory / f"{shard:03d}.tar"))
        with webdataset.TarWriter(paths[-1]) as writer:
            for row in range(size * shard // num_shards, size * (shard + 1) // num_shards):
                item = pairs[row]
                arrays = {f"{side}.npy": item[side].numpy() for side in ("audio", "text")}
                writer.write({"__key__": f"{row:03d}", **arrays})
    return paths


def as_pair(sample: dict) -> dict:
    return {
        "audio": torch.from_numpy(sample["audio.npy"]),
        "text": torch.from_numpy(sample["text.npy"]),
        "clip_id": int(sample["__key__"]),
        "key": sample["__key__"],
    }


def web_pairs(urls: list[str], **settings):
    """A WebDataset of pairs; shards in their order unless told otherwise."""
    import webdataset

    settings = {"shardshuffle": False} | settings
    return webdataset.WebDataset(urls, **settings).decode().map(as_pair)


def numbered_pair(row: int, size: int = 44) -> dict:
    item = Pairs(size)[row]
    return {"audio": item["audio"], "text": item["text"], "clip_id": row}


def write_chunks(directory: Path, size: int = 44) -> str:
    """Chunks of 5 numbered pairs, written in this process."""
    from litdata.streaming.cache import Cache

    cache = Cache(str(directory), chunk_size=5)
    for row in range(size):
        cache[row] = numbered_pair(row, size)
    cache.done()
    cache.merge()
    return str(directory)
