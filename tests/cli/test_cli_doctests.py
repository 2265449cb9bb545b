"""The examples in the docstrings of the command line and of tracking run as they are printed."""

import doctest
import importlib
import pkgutil

import pytest

import ask_lightning.cli
import ask_lightning.metrics.table
import ask_lightning.tracking

MODULES = ["ask_lightning.metrics.table"] + [
    f"{package.__name__}.{module.name}"
    for package in (ask_lightning.cli, ask_lightning.tracking)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ask_lightning.tracking.__all__)
def test_every_public_name_has_an_example(name):
    documented = getattr(ask_lightning.tracking, name)
    assert any(test.examples for test in doctest.DocTestFinder().find(documented, name))
