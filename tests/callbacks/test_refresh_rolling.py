"""`mode="rolling"`: in each epoch another part of the rows is encoded."""

import re

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning import KnowledgeRefreshCallback
from ask_lightning.callbacks.partial_refresh import items_of, rolling_items
from tests.helpers.clients import Pairs, make_loader
from tests.helpers.interrupted_run import Stop, Stopped
from tests.helpers.ranks import on_ranks
from tests.helpers.renewal_run import PAIRS, assert_goes_on, fit, logged

T = 3


@pytest.fixture(name="whole", scope="module")
def whole_fixture():
    return fit(T=T, mode="rolling", epochs=6)


def test_an_epoch_encodes_its_part_and_keeps_the_rest(whole):
    for epoch in range(1, 6):
        part = rolling_items(PAIRS, T, epoch, seed=0)
        others = torch.ones(PAIRS, dtype=torch.bool)
        others[part] = False
        before, stored, fresh = (whole[name] for name in ("stored", "stored", "fresh"))
        torch.testing.assert_close(stored[epoch][part], fresh[epoch][part], atol=1e-6, rtol=0)
        torch.testing.assert_close(stored[epoch][others], before[epoch - 1][others], atol=1e-6, rtol=0)
        assert (stored[epoch][others] - fresh[epoch][others]).abs().amax(dim=1).min() > 1e-4
        assert not torch.equal(whole["prototypes"][epoch], whole["prototypes"][epoch - 1])


def test_no_row_is_older_than_T_epochs(whole):
    assert logged(whole, "ask/row_age_max") == [0, 1, 2, 3 - 1, 2, 2]
    assert logged(whole, "ask/row_age_mean") == pytest.approx([0, 2 / 3, 1, 1, 1, 1])
    assert logged(whole, "ask/encoded_share") == pytest.approx([1, *[1 / 3] * 5])


class Cropped(Pairs):
    """Pairs that are read through another object, a new one each time."""

    def without_random_crops(self) -> Pairs:
        return Pairs(len(self))


class CroppedData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Cropped(PAIRS), 8, shuffle=True)


@pytest.mark.parametrize("ids", ["clip_id", None])
def test_training_data_with_random_crops_are_the_same_source_at_each_refresh(ids, recwarn):
    run = fit(T=T, mode="rolling", epochs=4, data=CroppedData(), ids=ids)
    assert logged(run, "ask/encoded_share") == pytest.approx([1, *[1 / 3] * 3])
    assert not [warning for warning in recwarn if "another one" in str(warning.message)]


def test_resumed_exactly(whole, tmp_path):
    with pytest.raises(Stopped):
        fit(1, tmp_path / "one", T=T, mode="rolling", epochs=6, extra=(Stop(3),))
    resumed = fit(1, tmp_path / "two", T=T, mode="rolling", epochs=6, resume=tmp_path / "one" / "last.ckpt")
    assert_goes_on(resumed, whole, 3)
    assert logged(resumed, "ask/row_age_max") == [2, 2, 2]


@pytest.mark.parametrize(("items", "period"), [(7, 3), (48, 5), (2, 5)])
def test_each_round_has_each_item_once(items, period):
    parts = [rolling_items(items, period, epoch, seed=3) for epoch in range(period, 2 * period)]
    assert torch.cat(parts).sort().values.tolist() == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(torch.equal(part, part.sort().values) for part in parts)
    assert torch.equal(parts[0], rolling_items(items, period, 0, seed=3)), "the order of rounds is the same"


def test_more_epochs_than_items():
    run = fit(T=100, mode="rolling", epochs=4)
    assert logged(run, "ask/encoded_share")[0] == 1
    assert sum(logged(run, "ask/encoded_share")[1:]) * PAIRS == pytest.approx(
        sum(len(rolling_items(PAIRS, 100, epoch, 0)) for epoch in (1, 2, 3))
    )


def test_half_precision_keeps_the_other_rows():
    run = fit(T=T, mode="rolling", epochs=2, storage="float16")
    part = rolling_items(PAIRS, T, 1, seed=0)
    others = [row for row in range(PAIRS) if row not in part.tolist()]
    torch.testing.assert_close(run["stored"][1][others], run["stored"][0][others], atol=1e-3, rtol=0)


def test_a_source_that_changes_is_encoded_anew():
    sizes = iter([20, 20, 24])
    with pytest.warns(UserWarning, match=r"that of the 20 pairs in use \(its items, .*\), so all of it"):
        run = fit(T=2, mode="rolling", epochs=3, source=lambda: Pairs(next(sizes), seed=7))
    assert [len(stored) for stored in run["stored"]] == [20, 20, 24]


def test_another_dataset_with_the_same_number_of_rows_is_noticed():
    shifts = iter([0, 0, 100])

    def source():
        pairs = Pairs(20)
        pairs.clip_id = pairs.clip_id + next(shifts)
        return pairs

    with pytest.warns(UserWarning, match="another one than that of the 20 pairs"):
        fit(T=2, mode="rolling", epochs=3, source=source)


class Stream(IterableDataset):
    def __iter__(self):
        pairs = Pairs(16)
        return (pairs[row] for row in range(16))


def test_needs_an_index():
    text = re.escape(
        'KnowledgeRefreshCallback(mode="rolling") works on old and new embeddings of the same rows'
    )
    with pytest.raises(ValueError, match=text):
        fit(T=2, mode="rolling", source=Stream(), epochs=1)


def test_items_of_a_base_of_several_captions():
    class Base:
        fine = range(40)

    loader = make_loader(10)
    assert items_of(Base(), loader, None) == (10, 4)
    assert items_of(Base(), loader, 8) == (8, 5)
    assert items_of(Base(), make_loader(16), None) == (0, 0)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_on_two_ranks_as_on_one(placement, whole):
    one, other = on_ranks(2, fit, 2, T=T, mode="rolling", epochs=3, placement=placement, grouped=False)
    assert one["knowledge"] == other["knowledge"]
    assert logged(one, "ask/row_age_max") == [0, 1, 2]
    for epoch in range(3):
        for run in (one, other):
            torch.testing.assert_close(run["stored"][epoch], whole["stored"][epoch], atol=1e-4, rtol=0)


def test_T_has_to_be_a_number():
    with pytest.raises(ValueError, match='`T` has to be a number of epochs with mode="rolling"'):
        KnowledgeRefreshCallback("auto", mode="rolling")
