"""Demo data for all tests of the command line, and quiet."""

import pytest

from ask_lightning.cli.demo import write_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> str:
    """The flag with the folder."""
    return f"--demo={write_demo(tmp_path_factory.mktemp('demo'))}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Runs go to a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
