"""The knowledge base that a short run begins with."""

from ask_lightning import KnowledgeBase
from tests.helpers.clients import PlainTowers, make_loader, make_refresh, make_trainer, wrap


def knowledge(training=None, callback=None, **settings) -> KnowledgeBase:
    """The base that a run has after its first step; ids are row numbers of `Pairs`."""
    module = wrap(PlainTowers(), ids="clip_id")
    run = make_trainer(max_epochs=1, max_steps=1, callbacks=[callback or make_refresh()], **settings)
    run.fit(module, training if training is not None else make_loader())
    return module.loss.knowledge


def rows(*args, **kwargs) -> list[int]:
    return knowledge(*args, **kwargs).ids.tolist()
