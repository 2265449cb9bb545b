"""Streams whose shards are divided among ranks: each pair once, and a word where it is not so."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning.utilities.distributed import Ranks
from tests.helpers.clients import Pairs, PlainTowers, make_refresh, make_trainer, wrap
from tests.helpers.ranks import on_ranks
from tests.helpers.streams import web_pairs, write_chunks, write_shards


def told(training, source=None, **settings) -> tuple[list[int] | str, list[str]]:
    """The ids of the knowledge, or an error, and the warnings of this rank."""
    pl.seed_everything(1, verbose=False)
    module = wrap(PlainTowers(), {"num_neighbors": 1}, ids="clip_id")
    run = make_trainer(
        max_steps=2, devices=2, strategy="ddp", callbacks=[make_refresh(source=source)], **settings
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            run.fit(module, training)
        except Exception as error:
            return f"{type(error).__name__}: {error}", []
    return module.loss.knowledge.ids.tolist(), [str(each.message) for each in seen]


def read_shards(urls: list[str], kind: str, num_workers: int) -> tuple[list[int] | str, list[str]]:
    import webdataset as wds

    splitter = {"nobody splits": None, "not split at all": wds.single_node_only}.get(kind, wds.split_by_node)
    data = web_pairs(urls, nodesplitter=splitter, empty_check=False)
    if kind == "as source":
        return told(DataLoader(Pairs(48), 4), source=data)
    if kind == "an epoch":
        return told(wds.WebLoader(data, batch_size=4, num_workers=num_workers).with_epoch(3))
    return told(wds.WebLoader(data, batch_size=4, num_workers=num_workers))


@pytest.fixture(name="urls", scope="module")
def urls_fixture(tmp_path_factory):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    return write_shards(tmp_path_factory.mktemp("shards"), num_shards=5)


def is_about(messages: list[str], words: str) -> bool:
    return any(words in message for message in messages)


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [("a stream", 0), pytest.param("a stream", 2, marks=pytest.mark.slow), ("an epoch", 0), ("as source", 0)],
)
def test_every_pair_of_the_shards_once(kind, num_workers, urls):
    first, second = on_ranks(2, read_shards, urls, kind, num_workers, grouped=False)
    assert sorted(first[0]) == list(range(44))
    assert second[0] == first[0]
    # Of five shards one process has three.
    assert is_about(first[1], "26, 18 pairs of the training stream") == (kind == "a stream")
    assert not is_about(first[1], "read by several processes")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("nobody splits", "Ranks 0 and 1 read the same 44 pairs"),
        ("not split at all", "explicit nodesplitter"),
    ],
)
def test_shards_that_are_not_divided(kind, text, urls):
    for result, _ in on_ranks(2, read_shards, urls, kind, 0, grouped=False):
        assert text in result


class Overlapping(IterableDataset):
    """Gives both ranks the pairs from 10 to 19."""

    def __iter__(self):
        pairs = Pairs(30)
        rows = (range(20), range(10, 30))[Ranks.current().rank]
        return (pairs[row] for row in rows)


def read_overlapping() -> tuple[list[int] | str, list[str]]:
    return told(DataLoader(Pairs(48), 4), source=DataLoader(Overlapping(), 7))


def test_a_shard_that_two_ranks_read_is_pointed_at():
    first, second = on_ranks(2, read_overlapping, grouped=False)
    assert len(first[0]) == 40
    assert is_about(first[1], "10 of the 40 pairs of the knowledge source are read by several processes")
    assert not is_about(second[1], "are read by several")


class Chunks(pl.LightningDataModule):
    """Makes its dataset when the processes know each other, which litdata asks for in its constructor."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory

    def train_dataloader(self) -> DataLoader:
        import litdata

        return litdata.StreamingDataLoader(
            litdata.StreamingDataset(self.directory), batch_size=4, shuffle=True
        )


def read_chunks(directory: str, kind: str) -> tuple[list[int] | str, list[str]]:
    chunks = Chunks(directory)
    if kind == "as source":
        return told(DataLoader(Pairs(48), 4), source=chunks.train_dataloader)
    return told(chunks.train_dataloader() if kind == "made too early" else chunks)


@pytest.mark.parametrize("kind", ["as training data", "as source", "made too early"])
def test_every_item_of_litdata_once(kind, tmp_path):
    pytest.importorskip("litdata", reason="litdata is not installed")
    directory = write_chunks(Path(tmp_path) / "pairs", size=43)
    first, second = on_ranks(2, read_chunks, directory, kind, grouped=False)
    assert first[0] == second[0]
    if kind == "made too early":
        assert "Ranks 0 and 1 read the same" in first[0]
    else:
        assert sorted(first[0]) == list(range(43)), first[0]


class UnevenChunks(Chunks):
    """22 and 21 pairs, of which one rank makes four batches and the other three."""

    def train_dataloader(self) -> DataLoader:
        import litdata

        return litdata.StreamingDataLoader(
            litdata.StreamingDataset(self.directory, drop_last=False), batch_size=7
        )


def read_uneven_chunks(directory: str) -> tuple[list[int] | str, list[str]]:
    return told(UnevenChunks(directory))


def test_different_numbers_of_batches_are_pointed_at(tmp_path):
    pytest.importorskip("litdata", reason="litdata is not installed")
    directory = write_chunks(Path(tmp_path) / "pairs", size=43)
    first, second = on_ranks(2, read_uneven_chunks, directory, grouped=False)
    told_words = [text for text in first[1] if "training batches in an epoch" in text]
    assert len(told_words) == 1
    assert "limit_train_batches=3" in told_words[0]
    assert not is_about(second[1], "training batches in an epoch")
