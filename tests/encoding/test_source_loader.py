"""`source_loader` in a run: which rows become knowledge, and in which order."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from tests.helpers.clients import (
    Pairs,
    PlainTowers,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.first_base import knowledge, rows

PAIRS = Pairs(48)


class Buckets(Sampler):
    """A custom batch sampler over some rows, with or without what torch's own has."""

    def __init__(self, indices, **attributes):
        self.indices = list(indices)
        vars(self).update(attributes)

    def __len__(self):
        return len(self.indices) // 8

    def __iter__(self):
        for start in range(0, len(self.indices) - 7, 8):
            yield self.indices[start : start + 8]


class Stream(IterableDataset):
    """Pairs without a length."""

    def __init__(self, size=44, batches=None):
        self.pairs, self.batches = Pairs(size), batches

    def __iter__(self):
        if self.batches:
            return iter(DataLoader(self.pairs, self.batches))
        return (self.pairs[row] for row in range(len(self.pairs)))


WHOLE_LOADERS = {
    "shuffle": lambda: DataLoader(PAIRS, 8, shuffle=True),
    "drop_last": lambda: DataLoader(PAIRS, 7, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(PAIRS, 8, shuffle=True, generator=torch.Generator()),
    "fewer draws": lambda: DataLoader(PAIRS, 8, sampler=RandomSampler(PAIRS, num_samples=16)),
    "weights": lambda: DataLoader(PAIRS, 8, sampler=WeightedRandomSampler(torch.rand(48), 16)),
    "distributed": lambda: DataLoader(PAIRS, 8, sampler=DistributedSampler(PAIRS, 5, 0)),
    "epoch seeded": make_loader,
    "batch sampler": lambda: DataLoader(
        PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS), 8, drop_last=True)
    ),
    "own batch sampler": lambda: DataLoader(PAIRS, batch_sampler=Buckets(range(48), batch_size=8)),
    "workers": lambda: DataLoader(
        PAIRS, 8, shuffle=True, num_workers=1, prefetch_factor=3, persistent_workers=True
    ),
}


@pytest.mark.parametrize("name", WHOLE_LOADERS)
def test_every_row_once_and_in_order(name, recwarn):
    assert rows(WHOLE_LOADERS[name]()) == list(range(48))
    assert not [warning for warning in recwarn if "visits" in str(warning.message)]


TRAINING_ROWS = [row for row in range(48) if row % 3]
SUBSETS = {
    "sampler": lambda: DataLoader(PAIRS, 8, sampler=SubsetRandomSampler(TRAINING_ROWS)),
    "sampler of a tensor": lambda: DataLoader(
        PAIRS, 8, sampler=SubsetRandomSampler(torch.tensor(TRAINING_ROWS))
    ),
    "batch sampler": lambda: DataLoader(
        PAIRS, batch_sampler=BatchSampler(SubsetRandomSampler(TRAINING_ROWS), 8, drop_last=True)
    ),
    "subset": lambda: DataLoader(Subset(PAIRS, TRAINING_ROWS), 8, shuffle=True),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_validation_rows_never_enter(name):
    assert rows(SUBSETS[name]()) == TRAINING_ROWS


class EveryOther(Sampler):
    def __len__(self):
        return 24

    def __iter__(self):
        return iter(range(0, 48, 2))


def test_unknown_sampler_that_leaves_rows_out_is_pointed_at():
    data = DataLoader(PAIRS, 8, sampler=EveryOther())
    with pytest.warns(
        UserWarning,
        match=r"EveryOther visits 24 rows an epoch, but the knowledge is made of all 48 rows.*source=dataset",
    ):
        assert rows(data) == list(range(48))


def test_unknown_batch_sampler_that_leaves_rows_out_is_pointed_at():
    data = DataLoader(PAIRS, batch_sampler=Buckets(range(24), batch_size=8))
    with pytest.warns(UserWarning, match=r"Buckets visits 24 rows an epoch.*all 48 rows"):
        assert rows(data) == list(range(48))


def test_batch_sampler_without_a_size_needs_one():
    data = DataLoader(PAIRS, batch_sampler=Buckets(range(48)))
    with pytest.raises(ValueError, match=r"items need a batch size, and its loader has none of its own"):
        rows(data)
    assert rows(data, make_refresh(batch_size=10)) == list(range(48))


def test_loader_whose_dataset_makes_the_batches():
    stream = DataLoader(Stream(batches=8), batch_size=None)
    with pytest.raises(ValueError, match=r"`batch_size` has to be left out, but got 4.*`batch_size=None`"):
        rows(stream, make_refresh(batch_size=4))
    with pytest.raises(ValueError, match=r"items need a batch size, and its loader has none of its own"):
        rows(stream, make_refresh(source=Pairs(20)))
    assert rows(stream, make_refresh(source=Pairs(20), batch_size=5)) == list(range(20))


def test_last_batch_that_is_dropped_is_no_selection(recwarn):
    data = DataLoader(PAIRS, batch_sampler=Buckets(range(42), batch_size=8))
    with pytest.warns(UserWarning, match="visits 40 rows"):
        rows(data)
    data = DataLoader(Pairs(44), batch_sampler=Buckets(range(44), batch_size=8))
    assert rows(data) == list(range(44))
    assert not [warning for warning in recwarn if "visits 40 rows" in str(warning.message)]


OTHER = Pairs(20, seed=5)
SOURCES = {
    "Dataset": lambda: OTHER,
    "DataLoader": lambda: DataLoader(OTHER, 3, shuffle=True, drop_last=True),
    "callable for a Dataset": lambda: lambda: OTHER,
    "callable for a DataLoader": lambda: lambda: DataLoader(OTHER, 3),
    "callable for batches": lambda: lambda: list(DataLoader(OTHER, 3)),
    "list of batches": lambda: list(DataLoader(OTHER, 3)),
    "tuple of batches": lambda: tuple(DataLoader(OTHER, 3)),
    "concatenation": lambda: ConcatDataset([Subset(OTHER, range(7)), Subset(OTHER, range(7, 20))]),
    "stream": lambda: DataLoader(Stream(20), 3),
    "stream of batches": lambda: DataLoader(Stream(20, batches=3), batch_size=None),
    "callable for an iterator": lambda: lambda: (batch for batch in list(DataLoader(OTHER, 3))),
}


@pytest.mark.parametrize("name", [name for name in SOURCES if "iterator" not in name])
def test_source(name):
    assert rows(callback=make_refresh(source=SOURCES[name]())) == list(range(20))


ONCE_ONLY = {
    "iterator": iter([]),
    "generator": (batch for batch in []),
    "callable for an iterator": SOURCES["callable for an iterator"](),
    "path": "train.csv",
    "number": 3,
    "mapping": {"a": OTHER},
}


@pytest.mark.parametrize("name", ONCE_ONLY)
def test_source_that_cannot_be_read_again(name):
    with pytest.raises(
        TypeError, match=r"`source` has to be a Dataset, a DataLoader, a callable.*source=dataset"
    ):
        rows(callback=make_refresh(source=ONCE_ONLY[name]))


STREAMS = {
    "pairs": lambda: DataLoader(Stream(), 8),
    "with a worker": lambda: DataLoader(Stream(), 8, num_workers=1),
    "batches": lambda: DataLoader(Stream(batches=8), batch_size=None),
}


@pytest.mark.parametrize("name", STREAMS)
def test_training_data_of_unknown_length(name):
    assert rows(STREAMS[name](), make_refresh(num_workers=0)) == list(range(44))


@pytest.mark.parametrize("empty", [[], Subset(PAIRS, []), DataLoader(Subset(PAIRS, []), 4), Stream(0)])
def test_empty_source(empty):
    with pytest.raises(ValueError, match=r"The knowledge source is empty"):
        rows(callback=make_refresh(source=empty))


@pytest.mark.parametrize(
    ("settings", "sizes"), [({}, [8] * 6), ({"batch_size": 20}, [20, 20, 8]), ({"num_workers": 2}, [8] * 6)]
)
def test_batch_size_and_workers(settings, sizes):
    class Client(PlainTowers):
        seen = ()

        def encode_audio(self, batch):
            if not torch.is_grad_enabled():
                self.seen = (*self.seen, len(batch["audio"]))
            return super().encode_audio(batch)

    model = Client()
    make_trainer(max_epochs=1, callbacks=[make_refresh(**settings)]).fit(wrap(model), make_loader())
    assert list(model.seen) == sizes


class Tuples(Pairs):
    def __getitem__(self, row):
        item = super().__getitem__(row)
        return item["audio"], item["text"], row


def collate(items):
    audio, text, row = zip(*items, strict=True)
    return {"audio": torch.stack(audio), "text": torch.stack(text), "clip_id": torch.tensor(row)}


def test_collation_is_kept():
    training = DataLoader(Tuples(48), 8, shuffle=True, collate_fn=collate)
    assert rows(training) == list(range(48))
    assert rows(training, make_refresh(source=Tuples(20))) == list(range(20)), "a Dataset is collated alike"
    own = DataLoader(Pairs(20), 5)
    assert rows(training, make_refresh(source=own)) == list(range(20)), (
        "a DataLoader brings its own collation"
    )


def test_several_captions_of_a_clip():
    base = knowledge(make_loader(captions_per_clip=3))
    assert base.ids.tolist() == [row // 3 for row in range(48)]


class Doubling(DataLoader):
    """Changes the batches that it yields."""

    def __iter__(self):
        return ({**batch, "audio": 2 * batch["audio"] + 1} for batch in super().__iter__())


class Wider(DataLoader):
    """A subclass that leaves iteration alone."""

    def __init__(self, dataset):
        super().__init__(dataset, 8)


def test_training_loader_that_changes_batches_is_noticed():
    with pytest.raises(TypeError, match=r"Doubling makes its batches by an `__iter__`.*source=loader"):
        rows(Doubling(PAIRS, 8))
    assert rows(Wider(PAIRS)) == list(range(48))


def test_source_that_changes_batches_is_used_as_it_is():
    model = PlainTowers()
    with torch.no_grad():
        audio = model.audio_encoder(2 * OTHER.audio + 1)
    module = wrap(model)
    run = make_trainer(max_epochs=1, max_steps=1, callbacks=[make_refresh(source=Doubling(OTHER, 5))])
    run.fit(module, make_loader())
    assert module.loss.knowledge.fine.audio.allclose(torch.nn.functional.normalize(audio, dim=1), atol=1e-6)
    with pytest.raises(TypeError, match="number of workers"):
        rows(callback=make_refresh(source=Doubling(OTHER, 5), batch_size=4))


def test_list_of_samples():
    class Client(PlainTowers):
        def encode_audio(self, batch):
            return self.audio_encoder(batch["audio"])

    run = make_trainer(callbacks=[make_refresh(source=[PAIRS[row] for row in range(20)])])
    with pytest.raises(ValueError, match=r"list of samples, make batches of it: DataLoader\(samples"):
        run.fit(wrap(Client()), make_loader())
