"""The losses of our comparisons: as many settings for each, and each trains."""

import pickle

import pytest

from ask_lightning import DriftMonitor, KnowledgeRefreshCallback
from ask_lightning.losses import NTXentLoss, RetrievalLoss
from ask_lightning.reproduce import LOSSES, candidates, loss_methods
from ask_lightning.reproduce.run_table import settings_text
from tests.helpers.clients import Pairs, PlainTowers, make_loader, make_trainer


class Towers(PlainTowers):
    """Towers that remember their learning rate."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_eight_different_settings_that_it_takes(name):
    settings = candidates(name, 1e-3)
    assert len(set(map(settings_text, settings))) == 8
    assert {one["learning_rate"] for one in settings} == {5e-4, 1e-3, 2e-3}
    assert candidates(name, 1e-3, count=3) == settings[:3]
    (method,) = loss_methods([name], Towers, learning_rate=1e-3)
    for one in method.candidates:
        module, _ = method.build(one)
        assert isinstance(module.loss, RetrievalLoss)
        assert module.model.learning_rate == one["learning_rate"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    (method,) = loss_methods([name], Towers, learning_rate=0.1, refresh={"T": 1, "num_prototypes": 4})
    method = pickle.loads(pickle.dumps(method))
    module, callbacks = method.build(method.candidates[0])
    needs_knowledge = {KnowledgeRefreshCallback, DriftMonitor} if module.loss.needs_knowledge else set()
    assert {type(callback) for callback in callbacks} == needs_knowledge
    before = [parameter.clone() for parameter in module.parameters()]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(module, make_loader(len(Pairs(128))))
    assert any((old != new).any() for old, new in zip(before, module.parameters(), strict=True))


def test_plain_contrast_is_the_first():
    assert LOSSES["NT-Xent"] is NTXentLoss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("NT", 0.1), "`loss`"), (("ASK", 0.0), "`learning_rate`"), (("ASK", 0.1, 9), "`count`")],
)
def test_what_is_no_grid(arguments, message):
    with pytest.raises(ValueError, match=message):
        candidates(*arguments)
