"""Small audio files, and the three published datasets in small."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import ask_lightning.data.published.counts as counts_module
import ask_lightning.data.published.knowledge as knowledge_module
from ask_lightning.data import write_audiocaps, write_clotho, write_wavcaps
from tests.helpers.published import SMALL


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """Write an audio file: a tone, in the folder of the test."""

    def write(
        name: str, seconds: float = 1.0, rate: int = 16000, channels: int = 1, pitch: float = 440.0
    ) -> Path:
        time = np.arange(int(seconds * rate)) / rate
        tone = 0.5 * np.sin(2 * np.pi * pitch * time)
        path = tmp_path / name
        soundfile.write(path, np.stack([tone] * channels, axis=1), rate)
        return path

    return write


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The three datasets, written once."""
    folder = tmp_path_factory.mktemp("datasets")
    write_audiocaps(folder / "audiocaps", **SMALL)
    write_clotho(folder / "clotho", **SMALL)
    write_wavcaps(folder / "wavcaps", num_clips=16, seconds=0.8)
    return folder


@pytest.fixture
def roots(written, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(written, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def said(monkeypatch):
    """The lines of the log."""
    lines = []
    for module in (counts_module, knowledge_module):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines
