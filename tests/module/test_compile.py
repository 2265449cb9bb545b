"""`torch.compile` around the wrapper: the model's step and the loss are compiled, their exchange is not."""

import lightning.pytorch as pl
import pytest
import torch

from ask_lightning import ASKModule
from tests.helpers.clients import (
    CriterionClient,
    FrozenClient,
    Pairs,
    PlainTowers,
    Watcher,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)


@pytest.mark.parametrize(
    ("client", "options"),
    [(FrozenClient, {}), (CriterionClient, {"criterion": "loss_fn"}), (PlainTowers, {"step": "encode"})],
)
def test_compiled_wrapper_trains_like_the_plain_one(client, options):
    compiled_nodes = []

    def compiler(graph, example_inputs):
        compiled_nodes.append(len(graph.graph.nodes))
        return graph.forward

    def fit(compiled):
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        module, watcher, refresh = wrap(client(), **options), Watcher(), make_refresh(1, Pairs(16))
        run = make_trainer(max_epochs=2, limit_train_batches=3, callbacks=[refresh, watcher])
        run.fit(torch.compile(module, backend=compiler) if compiled else module, make_loader(), held_out())
        return watcher

    compiled, plain = fit(True), fit(False)
    assert sum(compiled_nodes) > 100, "the encoders and the loss are in graphs"
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)


def test_wrapper_around_a_compiled_model():
    with pytest.raises(TypeError, match=r"compiled.*Wrap it first.*torch.compile\(ASKModule\(model\)\)"):
        ASKModule(torch.compile(PlainTowers(), backend="eager"))


def test_wrapper_around_a_wrapper():
    with pytest.raises(TypeError, match=r"has to be a model without ASK, but got an ASKModule.*`.model`"):
        ASKModule(wrap(PlainTowers()))
