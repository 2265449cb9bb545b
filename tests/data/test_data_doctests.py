"""The examples in the docstrings run as they are printed, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ask_lightning.data

MODULES = sorted(module.name for module in pkgutil.iter_modules(ask_lightning.data.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path):
    module = importlib.import_module(f"ask_lightning.data.{name}")
    for number, example in enumerate(doctest.DocTestFinder(exclude_empty=True).find(module)):
        folder = tmp_path / str(number)
        folder.mkdir()
        example.globs["getfixture"] = {"tmp_path": folder}.__getitem__
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(example).failed == 0, example.name


@pytest.mark.parametrize("name", ask_lightning.data.__all__)
def test_public_functions_and_classes_have_an_example(name):
    documented = getattr(ask_lightning.data, name)
    without_behaviour = {"CaptionedFile", "Event", "Leakage", "AudioFileError"}
    if (inspect.isclass(documented) or inspect.isfunction(documented)) and name not in without_behaviour:
        assert ">>>" in inspect.getdoc(documented)
