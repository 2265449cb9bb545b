"""The losses of our comparisons: as many settings for each, and each trains."""

import pickle
from dataclasses import replace

import pytest

from ask_lightning import DriftMonitor, KnowledgeRefreshCallback
from ask_lightning.losses import NTXentLoss, RetrievalLoss
from ask_lightning.reproduce import LOSSES, loss_methods
from ask_lightning.reproduce.run_table import settings_text
from tests.helpers.clients import Pairs, PlainTowers, make_loader, make_trainer


class Towers(PlainTowers):
    """Towers that remember their learning rate."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_eight_different_settings_that_it_takes(name):
    settings = LOSSES[name].candidates(1e-3, 8)
    assert len(set(map(settings_text, settings))) == 8
    assert {one["learning_rate"] for one in settings} == {5e-4, 1e-3, 2e-3}
    assert LOSSES[name].candidates(1e-3, count=3) == settings[:3]
    (method,) = loss_methods({name: LOSSES[name]}, Towers, learning_rate=1e-3)
    for one in method.candidates:
        module, _ = method.build(one)
        assert isinstance(module.loss, RetrievalLoss)
        assert module.model.learning_rate == one["learning_rate"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    refresh = {"T": 1, "num_prototypes": 4}
    (method,) = loss_methods({name: LOSSES[name]}, Towers, learning_rate=0.1, refresh=refresh)
    method = pickle.loads(pickle.dumps(method))
    module, callbacks = method.build(method.candidates[0])
    needs_knowledge = {KnowledgeRefreshCallback, DriftMonitor} if module.loss.needs_knowledge else set()
    assert {type(callback) for callback in callbacks} == needs_knowledge
    before = [parameter.clone() for parameter in module.parameters()]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(module, make_loader(len(Pairs(128))))
    assert any((old != new).any() for old, new in zip(before, module.parameters(), strict=True))


def test_options_and_refresh_of_a_variant_are_its_own():
    variant = replace(LOSSES["ASK"], options={"ot_factor": 0.0}, refresh={"T": 7})
    (method,) = loss_methods({"no transport": variant}, Towers, learning_rate=0.1, refresh={"T": 1})
    module, (refresh, _) = method.build(method.candidates[0])
    assert (module.loss.ot_factor, module.loss.temperature, refresh.T) == (0.0, 0.05, 7)


@pytest.mark.parametrize(("refresh", "key"), [({"T": 1}, None), ({"T": "auto"}, "caption_id")])
def test_captions_are_told_apart_where_rows_are_found(refresh, key):
    (method,) = loss_methods({"ASK": LOSSES["ASK"]}, Towers, learning_rate=0.1, refresh=refresh)
    module, _ = method.build(method.candidates[0])
    assert module._options()["caption_ids"] == key


def test_plain_contrast_is_the_first():
    assert LOSSES["NT-Xent"].loss is NTXentLoss


@pytest.mark.parametrize(("arguments", "message"), [((0.0, 1), "`learning_rate`"), ((0.1, 9), "`count`")])
def test_what_is_no_grid(arguments, message):
    with pytest.raises(ValueError, match=message):
        LOSSES["ASK"].candidates(*arguments)
