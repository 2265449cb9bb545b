"""The package's own names are imported when they are first used."""

import subprocess
import sys

import pytest

import ask_lightning


def test_all_names_are_there():
    assert all(getattr(ask_lightning, name).__name__ == name for name in ask_lightning.__all__)
    assert ask_lightning.functional.nt_xent
    with pytest.raises(AttributeError, match="module 'ask_lightning' has no attribute 'nothing'"):
        _ = ask_lightning.nothing


def test_the_package_itself_imports_nothing_heavy():
    code = "import ask_lightning, sys; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
