"""The examples in the docstrings run as they are printed, and public names have one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ask_lightning

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ask_lightning.__path__, "ask_lightning.")
    if not module.name.endswith(".__main__")
)
# What is only held or raised.
WITHOUT_BEHAVIOUR = {
    "AudioFileError",
    "Event",
    "Leakage",
    "Neighborhood",
    "RetrievalRanks",
}
PACKAGES = (
    "",
    ".data",
    ".functional",
    ".interaction",
    ".knowledge",
    ".metrics",
    ".models",
    ".losses",
    ".callbacks",
)
PUBLIC = sorted(
    {
        (package, name)
        for package in PACKAGES
        for name in importlib.import_module(f"ask_lightning{package}").__all__
        if name not in WITHOUT_BEHAVIOUR
    }
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path):
    module = importlib.import_module(name)
    for number, example in enumerate(doctest.DocTestFinder(exclude_empty=True).find(module)):
        folder = tmp_path / str(number)
        folder.mkdir()
        example.globs["getfixture"] = {"tmp_path": folder}.__getitem__
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(example).failed == 0, example.name


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_public_names_have_an_example(package, name):
    documented = getattr(importlib.import_module(f"ask_lightning{package}"), name)
    if inspect.isclass(documented) or inspect.isfunction(documented):
        assert any(test.examples for test in doctest.DocTestFinder().find(documented, name))
