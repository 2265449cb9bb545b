"""The examples run, every public name has one, and the package imports without the outer packages."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import ask_lightning.models

MODULES = [module.name for module in pkgutil.iter_modules(ask_lightning.models.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, request):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"ask_lightning.models.{name}")
    failed, _ = doctest.testmod(module, extraglobs={"getfixture": request.getfixturevalue})
    assert failed == 0


@pytest.mark.parametrize("name", ask_lightning.models.__all__)
def test_every_public_name_has_an_example(name):
    documented = getattr(ask_lightning.models, name)
    assert any(test.examples for test in doctest.DocTestFinder().find(documented, name))


ABSENT = """
import sys
import lightning, torchmetrics  # which import transformers where it is installed

outer = ("torchaudio", "transformers", "tokenizers", "soundfile")
for name in [name for name in sys.modules if name.startswith(outer)]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(outer))

import ask_lightning.models as models
models.TinyRetriever(), models.ResNet38(blocks=(1, 1, 1, 1)), models.CED(8, 1, 2)
try:
    models.ResNet38BERT(None, None)
except ImportError as error:
    print(error)
"""


def test_the_models_import_without_torchaudio_and_transformers():
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'pip install "ask-lightning[audio]"' in done.stdout
