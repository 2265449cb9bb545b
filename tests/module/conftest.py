import pytest


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    """Lightning writes below the working directory unless it is told otherwise."""
    monkeypatch.chdir(tmp_path)
