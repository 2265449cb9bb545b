"""The examples in the docstrings run as they are printed."""

import doctest
import importlib
import pkgutil

import pytest

import ask_lightning.functional

MODULES = sorted(module.name for module in pkgutil.iter_modules(ask_lightning.functional.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"ask_lightning.functional.{name}")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0


@pytest.mark.parametrize("name", ask_lightning.functional.__all__)
def test_every_public_function_has_an_example(name):
    examples = doctest.DocTestFinder().find(getattr(ask_lightning.functional, name))
    assert any(test.examples for test in examples)
