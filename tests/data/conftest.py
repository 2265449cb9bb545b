"""Small audio files for the tests of folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile


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
