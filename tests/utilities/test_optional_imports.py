"""A package that is missing is asked for by its extra and its purpose."""

import importlib
import sys
import threading
import time

import pytest

from ask_lightning.utilities.optional_imports import import_optional


@pytest.mark.parametrize(
    ("name", "extra", "purpose"),
    [
        ("h5py", "data", "to read HDF5 files"),
        ("pyarrow.parquet", "data", "to read parquet files"),
        ("datasets", "data", "to read parquet files and datasets of the Hugging Face hub"),
        ("soundfile", "audio", "to read and write audio files"),
        ("transformers", "audio", "for pretrained encoders"),
        ("torchaudio.transforms", "audio", "to resample audio"),
        ("matplotlib.figure", "plot", "to draw pictures"),
        ("ot.partial", "pot", "for the transport solvers of POT"),
    ],
)
def test_a_missing_package_says_what_to_install(monkeypatch, name, extra, purpose):
    package = name.partition(".")[0]
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'`{package}` is needed {purpose}.*pip install "ask-lightning\[{extra}\]"'
    with pytest.raises(ImportError, match=message):
        import_optional(name)


@pytest.mark.parametrize("failure", [OSError("libsndfile is not there"), RuntimeError("built for CUDA 12")])
def test_a_package_that_does_not_load(monkeypatch, failure):
    def load(name):
        raise failure

    monkeypatch.setattr("ask_lightning.utilities.optional_imports.importlib.import_module", load)
    with pytest.raises(ImportError, match=f"`soundfile` is needed .*{failure}"):
        import_optional("soundfile")


def test_threads_import_one_after_another(monkeypatch):
    importing, most = [], []

    def slow(name):
        importing.append(name)
        most.append(len(importing))
        time.sleep(0.02)
        if name == "torchaudio":  # which may import one itself
            import_optional("soundfile")
        importing.remove(name)

    monkeypatch.setattr(importlib, "import_module", slow)
    names = ["matplotlib.image", "torchaudio", "torchaudio.functional", "av"]
    threads = [threading.Thread(target=import_optional, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert sorted(most) == [1, 1, 1, 1, 2]
