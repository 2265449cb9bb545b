"""Faiss absent, broken, or installed twice."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase
from ask_lightning.knowledge.exact_search import ExactSearch
from ask_lightning.knowledge.search import build_search
from ask_lightning.utilities import faiss_import
from tests.helpers.vectors import directions, faiss_as

INSTALL = r"`pip install faiss-gpu`.*`pip install faiss-cpu`.*`index=\"exact\"`"


@pytest.fixture
def no_faiss():
    with faiss_as(None):
        yield


@pytest.fixture
def packages(monkeypatch):
    """Pretend that these distributions are installed; one of another name and a broken one are as well."""

    def install(*names: str) -> None:
        found = [SimpleNamespace(name=name) for name in ("numpy", None, *names)]
        monkeypatch.setattr(faiss_import, "distributions", lambda: iter(found))

    return install


@pytest.mark.usefixtures("no_faiss")
class TestAbsent:
    def test_importing_says_how_to_install(self):
        with pytest.raises(ImportError, match=rf"Faiss cannot be loaded \(.*\)\. .*{INSTALL}"):
            faiss_import.import_faiss()
        assert not faiss_import.faiss_is_available()
        assert not faiss_import.faiss_has_gpu()

    @pytest.mark.parametrize("index", ["Flat", "IVF4,Flat", "nonsense"])
    def test_an_index_that_is_asked_for_is_not_replaced(self, index):
        audio, text = directions(30, 4, 0), directions(30, 4, 1)
        with pytest.raises(ImportError, match=INSTALL):
            build_search(audio, index)
        with pytest.raises(ImportError, match=INSTALL):
            KnowledgeBase.from_embeddings(audio, text, num_prototypes=3, index=index)

    @pytest.mark.parametrize("is_cuda", [False, True])
    def test_auto_is_exact_search(self, monkeypatch, is_cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_cuda)
        built = build_search(SimpleNamespace(is_cuda=is_cuda), "auto")
        assert isinstance(built, ExactSearch)

    @pytest.mark.parametrize("index", ["auto", "exact"])
    def test_a_base_is_made_and_looked_up(self, index):
        audio, text = directions(200, 8, 0), directions(200, 8, 1)
        base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=10, index=index)
        found = base.lookup(audio[:5], text[:5], 3)
        assert found["fine"].audio_rows[:, 0].tolist() == list(range(5))
        assert base.coarse.audio.shape == (10, 8)

    def test_it_is_looked_for_again(self):
        """The failure is not remembered: a notebook may install Faiss while it runs."""
        assert not faiss_import.faiss_is_available()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "faiss", ModuleType("faiss"))
            assert faiss_import.faiss_is_available()


def test_a_build_that_breaks_while_loading():
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "faiss":
                raise AttributeError("half of another build")

    with faiss_as(None), pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "faiss")
        patch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        with pytest.raises(ImportError, match=rf"cannot be loaded \(half of another build\)\. .*{INSTALL}"):
            faiss_import.import_faiss()


def test_two_packages_that_load_are_warned_about(packages):
    packages("faiss-gpu", "FAISS-CPU")
    with faiss_as(ModuleType("faiss")), pytest.warns(UserWarning, match="Faiss may be corrupt") as caught:
        faiss_import.import_faiss()
    message = str(caught[0].message)
    assert "faiss-cpu and faiss-gpu are installed together" in message
    assert "uninstall all of them first. Install exactly one" in message


def test_two_packages_that_do_not_load_are_named(packages):
    packages("faiss-gpu-cu12", "faiss-cpu")
    with (
        faiss_as(None),
        pytest.raises(ImportError, match="faiss-cpu and faiss-gpu-cu12 are installed together"),
    ):
        faiss_import.import_faiss()


@pytest.mark.parametrize("names", [(), ("faiss-cpu",), ("faiss-gpu", "faiss-gpu")])
def test_one_package_is_as_it_should_be(packages, names, recwarn):
    packages(*names)
    with faiss_as(ModuleType("faiss")):
        assert faiss_import.import_faiss() is sys.modules["faiss"]
    assert len(recwarn) == 0
