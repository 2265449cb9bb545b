"""What tells one knowledge source from another."""

import gc

from torch.utils.data import DataLoader, Subset

from ask_lightning.encoding.source_identity import dataset_of, source_key, weak_reference
from tests.helpers.clients import Pairs


def test_selections_are_looked_through():
    pairs = Pairs(8)
    loader = DataLoader(Subset(Subset(pairs, range(6)), range(4)), 2)
    assert dataset_of(loader) is pairs
    key = source_key(loader)
    assert key.pop("selection") == source_key(loader)["selection"] is not None
    assert key == {"dataset": "tests.helpers.clients.Pairs", "items": 4}


def test_selections_of_the_same_length_are_told_apart():
    pairs = Pairs(8)

    def selection(*rows, of=pairs):
        return source_key(DataLoader(Subset(of, rows), 2))["selection"]

    assert source_key(DataLoader(pairs, 2))["selection"] is None
    assert selection(0, 1) == selection(0, 1, of=Pairs(8))
    assert (
        len({selection(0, 1), selection(2, 3), selection(1, 0), selection(0, 1, of=Subset(pairs, range(2)))})
        == 4
    )


def test_a_list_of_batches_is_its_own_dataset():
    batches = [1, 2]
    assert dataset_of(batches) is batches
    assert source_key(batches) == {"dataset": "builtins.list", "items": None, "selection": None}
    assert weak_reference(batches) is None


def test_a_dataset_is_not_kept_alive():
    pairs = Pairs(8)
    reference = weak_reference(pairs)
    assert reference() is pairs
    del pairs
    gc.collect()
    assert reference() is None
