"""Which rows become knowledge, and in which order: all of the source's, once, as they lie."""

import pytest
import torch
import torch.nn.functional as F
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
    AUDIO,
    Pairs,
    PlainTowers,
    Watcher,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)

PAIRS = Pairs(48)


def knowledge(training=None, callback=None, **settings):
    """The base that a run has after its first step; ids are row numbers of `Pairs`."""
    module = wrap(PlainTowers(), ids="clip_id")
    run = make_trainer(max_epochs=1, max_steps=1, callbacks=[callback or make_refresh()], **settings)
    run.fit(module, training if training is not None else make_loader())
    return module.loss.knowledge


def rows(*args, **kwargs) -> list[int]:
    return knowledge(*args, **kwargs).ids.tolist()


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


def test_rows_are_the_unit_embeddings_of_the_present_encoders():
    model = PlainTowers()
    module = wrap(model)
    with torch.no_grad():
        audio, text = model.audio_encoder(PAIRS.audio), model.text_encoder(PAIRS.text)
    make_trainer(max_epochs=1, limit_train_batches=1, callbacks=[make_refresh()]).fit(module, make_loader())
    base = module.loss.knowledge
    assert base.fine.audio.allclose(F.normalize(audio, dim=1), atol=1e-6)
    assert base.fine.text.allclose(F.normalize(text, dim=1), atol=1e-6)
    assert len(base.coarse) == 6
    assert base.ids.tolist() == list(range(48)), "row numbers where no ids are named"


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
    with pytest.raises(
        ValueError, match=r"Argument `batch_size` of KnowledgeRefreshCallback has to be given"
    ):
        rows(data)
    assert rows(data, make_refresh(batch_size=10)) == list(range(48))


def test_loader_whose_dataset_makes_the_batches():
    stream = DataLoader(Stream(batches=8), batch_size=None)
    with pytest.raises(ValueError, match=r"`batch_size` has to be left out, but got 4.*`batch_size=None`"):
        rows(stream, make_refresh(batch_size=4))
    with pytest.raises(ValueError, match=r"Argument `batch_size` .* has to be given"):
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


def test_source_is_read_anew_at_each_refresh():
    watcher = Watcher()
    module = wrap(PlainTowers())
    for source in (list(DataLoader(OTHER, 3)), lambda: OTHER):
        make_trainer(callbacks=[make_refresh(1, source), watcher]).fit(module, make_loader())
        assert len(set(watcher.knowledge[-18:])) == 3


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


def test_fewer_pairs_than_prototypes():
    with pytest.warns(
        UserWarning, match=r"fewer pairs \(48\) than prototypes asked for \(64\): `num_prototypes` becomes 48"
    ):
        base = knowledge(callback=make_refresh(num_prototypes=64))
    assert len(base.coarse) == 48


@pytest.mark.parametrize("pairing", ["matched", "joint", "audio", "text", "index"])
def test_prototype_settings_reach_the_base(pairing):
    base = knowledge(
        callback=make_refresh(prototype_pairing=pairing, normalize_prototypes=False, num_prototypes=4)
    )
    assert len(base.coarse) == 4
    assert not base.coarse.audio.norm(dim=1).allclose(torch.ones(4), atol=1e-3)


def test_index_that_cannot_be_built_fails_at_the_first_refresh():
    with pytest.raises(ValueError, match="no such index"):
        knowledge(callback=make_refresh(index="no such index"))


def test_loaders_reloaded_each_epoch():
    """The source is the data of the present epoch."""

    class Client(PlainTowers):
        def train_dataloader(self):
            return make_loader(16 * (1 + self.trainer.current_epoch))

    sizes = []

    class Look(Watcher):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(pl_module.loss.knowledge.fine))

    run = make_trainer(reload_dataloaders_every_n_epochs=1, callbacks=[make_refresh(1), Look()])
    run.fit(wrap(Client()))
    assert sizes == [16] * 2 + [32] * 4 + [48] * 6


class Sick(Pairs):
    """Some items make the encoders return NaN, Inf or zero."""

    def __init__(self, size=48, **values):
        super().__init__(size)
        for row, value in values.items():
            self.audio[int(row[1:])] = value


def test_nan_and_inf_name_their_rows():
    with pytest.raises(
        ValueError,
        match=r"audio embeddings of 2 of 48 source rows contain NaN or Inf \(rows 5, 31\).*Check these items",
    ):
        rows(callback=make_refresh(source=Sick(r5=float("nan"), r31=float("inf"))))


def test_rows_are_numbered_as_the_source_numbers_them():
    many = {f"r{row}": float("nan") for row in range(3, 40)}
    with pytest.raises(ValueError, match=r"audio embeddings of 37 of 48 .* \(rows 3, 4, 5, 6, 7, …\)"):
        rows(callback=make_refresh(source=Sick(**many)))


def test_all_zero_embeddings_are_counted():
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.audio_encoder = torch.nn.Linear(AUDIO, 8, bias=False)

    module, watcher = wrap(Client()), Watcher()
    source = Sick(r2=0.0, r9=0.0, r40=0.0)
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(source=source), watcher])
    with pytest.warns(UserWarning, match=r"audio embeddings of 3 of 48 source rows are all zero; they stay"):
        run.fit(module, make_loader())
    base = module.loss.knowledge
    assert (base.fine.audio[[2, 9, 40]] == 0).all()
    assert base.fine.audio.isfinite().all()
    assert all(loss == loss for loss in watcher.losses)
