"""The examples in the docstrings run as they are printed."""

import doctest
import importlib
import pkgutil

import pytest

import ask_lightning.knowledge
from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.knowledge.prototypes import match_clusters, max_pool
from ask_lightning.knowledge.search import first_largest

MODULES = sorted(module.name for module in pkgutil.iter_modules(ask_lightning.knowledge.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(f"ask_lightning.knowledge.{name}"))
    assert failed == 0


@pytest.mark.parametrize("documented", [KnowledgeBase, first_largest, match_clusters, max_pool])
def test_there_is_an_example(documented):
    assert any(test.examples for test in doctest.DocTestFinder().find(documented))
