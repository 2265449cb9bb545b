"""Parts of recordings are those of the whole, whatever the rate, and damage is noticed."""

import numpy as np
import pytest
import soundfile
import torch

from ask_lightning.data import AudioFileError
from ask_lightning.data.audio.decoding import (
    ArrayRecording,
    crop_step,
    open_audio,
    read_stretch,
    resampled_length,
)

RATE = 16000


@pytest.mark.parametrize("rate", [96000, 44100, 22050, 16000, 8000])
@pytest.mark.parametrize("channels", [1, 6])
def test_a_stretch_is_what_one_would_cut_from_the_whole(tmp_path, rate, channels):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (rate, channels))
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    with open_audio("a.wav", tmp_path / "a.wav") as recording:
        whole = read_stretch(recording, 32000)
        assert len(whole) == resampled_length(recording.frames, rate, 32000) == 32000
        step = crop_step(rate, 32000)
        for start in (0, step, 5 * step, 17 * step, 32000 - 4000 // step * step):
            part = read_stretch(recording, 32000, start, 4000)
            torch.testing.assert_close(part, whole[start : start + 4000], rtol=0, atol=1e-6)


def test_headers_that_promise_more_than_there_is(tmp_path):
    class Short(ArrayRecording):
        def read(self, start, count):
            return super().read(start, count)[: max(0, 950 - start)]

    recording = Short("a", np.arange(1000) / 1000, frames=1000, rate=100)
    assert read_stretch(recording, 100, 900, 100)[-1] == pytest.approx(0.949), "the last that can be read"
    broken = Short("a", np.arange(2000) / 2000, frames=2000, rate=100)
    with pytest.raises(AudioFileError, match=r"a: the file is damaged: 950 of 2000 samples can be read"):
        read_stretch(broken, 100, 900, 100)


def test_integers_are_scaled():
    samples = np.array([-32768, 0, 16384], dtype=np.int16)
    assert ArrayRecording("a", samples, 3, RATE).read(0, 3)[:, 0].tolist() == [-1, 0, 0.5]
