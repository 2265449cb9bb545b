"""How many rows a refresh reads: row limits, short debugging runs, streams without an end."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning.callbacks import DriftMonitor
from ask_lightning.encoding import row_limit
from tests.helpers.clients import Pairs, PlainTowers, make_loader, make_refresh, make_trainer, wrap
from tests.helpers.first_base import rows
from tests.helpers.ranks import on_ranks

PAIRS = Pairs(48)


class Endless(IterableDataset):
    """The same pairs again and again, and a count of how many were read by all that are made."""

    read = 0  # of the class: a refresh gives a stream its attributes back

    def __iter__(self):
        for row in itertools.count():
            type(self).read += 1
            yield PAIRS[row % 48]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(row_limit, "_ROWS_WITHOUT_A_WORD", 100)
    monkeypatch.setattr(row_limit, "_MOST_ROWS", 1000)


@pytest.mark.parametrize(("settings", "read"), [({}, 1000), ({"max_steps": 20}, 160)])
def test_endless_stream_is_an_error_that_says_how(settings, read):
    Endless.read = 0
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()], **settings)
    with (
        pytest.raises(RuntimeError, match=r"yielded .* pairs and has not ended.*source=dataset.*max_rows=N"),
        pytest.warns(UserWarning, match=r"has no length; 104 pairs have been read so far"),
    ):
        run.fit(wrap(PlainTowers()), DataLoader(Endless(), 8))
    assert read < Endless.read <= read + 8 + 8, "the trainer has read a batch before"


@pytest.mark.parametrize("limit", [{"max_rows": 20}, {"limit_train_batches": 5}, {"fast_dev_run": 2}])
def test_endless_stream_with_a_limit(limit):
    settings = dict(limit)
    refresh = make_refresh(**({"max_rows": settings.pop("max_rows")} if "max_rows" in limit else {}))
    wanted = {"max_rows": 20, "limit_train_batches": 40, "fast_dev_run": 16}[next(iter(limit))]
    module = wrap(PlainTowers(), ids="clip_id")
    run = make_trainer(callbacks=[refresh], **({"max_epochs": 1, "max_steps": 1} | settings))
    run.fit(module, DataLoader(Endless(), 8))
    assert module.loss.knowledge.ids.tolist() == list(range(wanted))


@pytest.mark.parametrize(
    "settings", [{"limit_train_batches": 2}, {"fast_dev_run": 2}, {"overfit_batches": 2}]
)
def test_trainer_that_reads_less_limits_the_refresh(settings):
    """The first rows, as many as an epoch visits."""
    module = wrap(PlainTowers(), ids="clip_id")
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(), DriftMonitor(4)], **settings)
    with pytest.warns(
        UserWarning, match=r"a refresh reads 16 pairs.*a teacher knows nothing.*source=dataset"
    ):
        run.fit(module, make_loader())
    assert module.loss.knowledge.ids.tolist() == list(range(16))


def test_training_data_that_are_batches_already():
    batches = list(DataLoader(PAIRS, 8))
    assert rows(DataLoader(batches, batch_size=None), limit_train_batches=3) == list(range(24))


def test_named_source_is_read_as_a_whole():
    assert rows(callback=make_refresh(source=PAIRS), limit_train_batches=2) == list(range(48))


def test_enough_rows_for_a_lookup():
    assert len(rows(limit_train_batches=1, training=DataLoader(PAIRS, 4))) == 8


@pytest.mark.parametrize(("max_rows", "number"), [(1, 1), (20, 20), (1000, 48)])
def test_row_limit(max_rows, number):
    module = wrap(PlainTowers(), {"num_neighbors": 1}, ids="clip_id")
    refresh = make_refresh(max_rows=max_rows, num_prototypes=1)
    make_trainer(max_epochs=1, max_steps=1, callbacks=[refresh]).fit(module, make_loader())
    assert module.loss.knowledge.ids.tolist() == list(range(number))


def test_row_limit_out_of_range():
    with pytest.raises(
        ValueError, match=r"Argument `max_rows` has to be an integer of at least 1, but got 0"
    ):
        make_refresh(max_rows=0)


def limited_on_two_ranks():
    module = wrap(PlainTowers(), ids="clip_id")
    run = make_trainer(
        max_epochs=1, max_steps=1, devices=2, strategy="ddp", callbacks=[make_refresh(max_rows=21)]
    )
    run.fit(module, make_loader())
    return module.loss.knowledge.ids


def test_row_limit_counts_over_ranks():
    for ids in on_ranks(2, limited_on_two_ranks, grouped=False):
        assert torch.equal(ids, torch.arange(21))
