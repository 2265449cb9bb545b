"""Streams of WebDataset and litdata as training data and as knowledge: every pair once, training kept."""

import multiprocessing

import pytest
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning.encoding.source_loader import source_loader
from tests.helpers.clients import Pairs, PlainTowers, Watcher, make_refresh, make_trainer, wrap
from tests.helpers.first_base import rows
from tests.helpers.streams import web_pairs, write_chunks, write_shards

IN_ORDER = list(range(44))


@pytest.fixture(name="wds", scope="module")
def wds_fixture():
    return pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.fixture(name="litdata", scope="module")
def litdata_fixture():
    return pytest.importorskip("litdata", reason="litdata is not installed")


@pytest.fixture(name="shards", scope="module")
def shards_fixture(wds, tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(name="chunks", scope="module")
def chunks_fixture(litdata, tmp_path_factory):
    return write_chunks(tmp_path_factory.mktemp("chunks") / "pairs")


TRAINING = {
    "a DataLoader": lambda wds, urls: DataLoader(web_pairs(urls), 8),
    "shuffled": lambda wds, urls: DataLoader(web_pairs(urls, shardshuffle=4).shuffle(20), 8),
    "shuffled by a seed": lambda wds, urls: DataLoader(
        web_pairs(urls, shardshuffle=4, detshuffle=True, seed=1), 8, drop_last=True
    ),
    "batched": lambda wds, urls: DataLoader(web_pairs(urls).batched(8, partial=False), batch_size=None),
    "a WebLoader": lambda wds, urls: wds.WebLoader(web_pairs(urls), batch_size=8),
    "a WebLoader of batches": lambda wds, urls: wds.WebLoader(web_pairs(urls).batched(8), batch_size=None),
    "a WebLoader that mixes workers": lambda wds, urls: (
        wds.WebLoader(web_pairs(urls).batched(4), batch_size=None)
        .unbatched()
        .shuffle(20)
        .batched(8, partial=False)
    ),
    "an epoch longer than the shards": lambda wds, urls: wds.WebLoader(
        web_pairs(urls), batch_size=8
    ).with_epoch(9),
    "an epoch shorter than the shards": lambda wds, urls: DataLoader(web_pairs(urls).with_epoch(16), 8),
    "shards with replacement": lambda wds, urls: DataLoader(
        web_pairs(urls, resampled=True).with_epoch(32), 8
    ),
    "repeated": lambda wds, urls: DataLoader(web_pairs(urls).repeat(2), 8),
    "a pipeline without a loader": lambda wds, urls: web_pairs(urls).shuffle(20).batched(8),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_pair_of_a_web_dataset_once_and_in_order(name, wds, shards):
    assert rows(TRAINING[name](wds, shards)) == IN_ORDER


SOURCES = {
    "a dataset": lambda wds, urls: web_pairs(urls, shardshuffle=4).shuffle(20),
    "a dataset of batches": lambda wds, urls: web_pairs(urls).batched(5),
    "a WebLoader": lambda wds, urls: wds.WebLoader(web_pairs(urls).shuffle(20), batch_size=5),
    "a callable": lambda wds, urls: lambda: web_pairs(urls),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_web_dataset_as_source(name, wds, shards):
    assert rows(callback=make_refresh(source=SOURCES[name](wds, shards))) == IN_ORDER


def test_a_dataset_beside_a_web_loader(wds, shards):
    training = wds.WebLoader(web_pairs(shards), batch_size=8)
    assert rows(training, make_refresh(source=Pairs(20))) == list(range(20))


def test_workers_divide_the_shards_and_end_with_the_refresh(wds, shards):
    before = set(multiprocessing.active_children())
    training = wds.WebLoader(web_pairs(shards), batch_size=8, num_workers=2, persistent_workers=True)
    loader = source_loader(None, training)
    assert sorted(row for batch in loader for row in batch["clip_id"].tolist()) == IN_ORDER
    assert training.pipeline[0]._iterator is None, "the loader of training is not iterated"

    class Fails(PlainTowers):
        def encode_audio(self, batch):
            raise OSError("out of memory")

    with pytest.raises(OSError, match="out of memory") as caught:
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Fails()), training)
    assert caught.value is not None
    training.pipeline[0]._iterator = None
    assert set(multiprocessing.active_children()) == before


def test_shards_that_are_divided_twice_are_refused(wds, shards):
    source = web_pairs(shards, nodesplitter=wds.split_by_node).compose(wds.split_by_node)
    with pytest.raises(ValueError, match=r"applies `split_by_node` 2 times.*leave the other out"):
        rows(callback=make_refresh(source=source))


@pytest.mark.parametrize("refresh_every", [1, 10])
def test_the_order_of_training_is_what_it_is_without_a_refresh(refresh_every, wds, shards):
    """A deterministic shuffle counts its epochs in the dataset itself."""

    def clips(ask: bool) -> list:
        data = DataLoader(web_pairs(shards, shardshuffle=4, detshuffle=True, seed=1), 8)
        model, watcher = PlainTowers(), Watcher()
        callbacks = [*([make_refresh(refresh_every)] if ask else []), watcher]
        make_trainer(callbacks=callbacks).fit(wrap(model) if ask else model, data)
        return watcher.clips

    assert clips(ask=True) == clips(ask=False)


def test_names_of_samples_are_ids(wds, shards):
    module = wrap(PlainTowers(), {"positives": "ids"}, ids="key")
    make_trainer(max_epochs=1, max_steps=1, callbacks=[make_refresh()]).fit(
        module, DataLoader(web_pairs(shards), 8)
    )
    assert len(set(module.loss.knowledge.ids.tolist())) == 44


def test_max_rows_of_a_stream(wds, shards):
    assert rows(callback=make_refresh(source=web_pairs(shards), max_rows=19)) == IN_ORDER[:19]


class OwnPlace(IterableDataset):
    """A stream that is its own iterator, as litdata's is."""

    def __init__(self) -> None:
        self.pairs, self.at, self.drawn = Pairs(44), 0, [0]

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == len(self.pairs):
            raise StopIteration
        self.at += 1
        self.drawn[0] += 1
        return self.pairs[self.at - 1]


def test_a_stream_that_is_its_own_iterator_keeps_its_place():
    """Training has read a batch ahead when the knowledge is encoded."""
    watcher, module = Watcher(), wrap(PlainTowers(), ids="clip_id")
    make_trainer(max_epochs=2, callbacks=[make_refresh(1), watcher]).fit(module, DataLoader(OwnPlace(), 8))
    assert module.loss.knowledge.ids.tolist() == IN_ORDER
    assert [clip for batch in watcher.clips for clip in batch] == 2 * IN_ORDER


class KeepsPlace(OwnPlace):
    """A stream that goes on where it was, as torchdata's examples do."""

    def __iter__(self):
        self.at %= len(self.pairs)
        return self

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_stream_that_would_not_begin_at_its_start_is_pointed_at():
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    with pytest.warns(UserWarning, match=r"KeepsPlace keeps its place .*source=function"):
        run.fit(wrap(PlainTowers()), DataLoader(KeepsPlace(), 8))


def test_a_fresh_stream_is_not(recwarn):
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(source=KeepsPlace)])
    run.fit(wrap(PlainTowers()), DataLoader(KeepsPlace(), 8))
    assert not [each for each in recwarn if "keeps its place" in str(each.message)]


@pytest.mark.parametrize("as_source", [False, True])
@pytest.mark.parametrize("with_loader", [False, True])
def test_every_item_of_litdata_once_and_in_order(as_source, with_loader, litdata, chunks):
    data = litdata.StreamingDataset(chunks, shuffle=True)
    loader = litdata.StreamingDataLoader(data, batch_size=8, shuffle=True, drop_last=True)
    if as_source:
        assert rows(callback=make_refresh(source=loader if with_loader else data)) == IN_ORDER
    else:
        assert rows(loader if with_loader else DataLoader(data, 8)) == IN_ORDER


def test_litdata_goes_on_where_it_was(litdata, chunks):
    def clips(ask: bool) -> list:
        data = litdata.StreamingDataset(chunks, seed=3)
        loader = litdata.StreamingDataLoader(data, batch_size=8, shuffle=True)
        model, watcher = PlainTowers(), Watcher()
        callbacks = [*([make_refresh(1)] if ask else []), watcher]
        make_trainer(callbacks=callbacks, max_epochs=2).fit(wrap(model) if ask else model, loader)
        return watcher.clips

    assert clips(ask=True) == clips(ask=False)
    reading = iter(litdata.StreamingDataLoader(litdata.StreamingDataset(chunks), batch_size=8))
    assert next(reading)["clip_id"].tolist() == IN_ORDER[:8]
