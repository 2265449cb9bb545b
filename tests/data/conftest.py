"""Small audio files and tables, and the three published datasets in small."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import ask_lightning.data.audio.decoding as decoding_module
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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a text, bytes, or what JSON can hold, into the folder of the test."""

    def write(name: str, content: str | bytes | list | dict) -> Path:
        path = tmp_path / name
        if isinstance(content, list | dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files whose samples were read, in order."""
    names = []
    read = decoding_module._SoundFile.read

    def spy(recording, start, count):
        names.append(recording.name.rpartition("/")[2])
        return read(recording, start, count)

    monkeypatch.setattr(decoding_module._SoundFile, "read", spy)
    return names


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
