"""Resampling and log-mel spectrograms against independent references; windows and filters are constants."""

import numpy as np
import pytest
import torch

from ask_lightning.data.audio.features import SILENCE, LogMel, Resample, log_mel, num_frames
from tests.helpers.retrievers import noise

transformers = pytest.importorskip("transformers")
torchaudio = pytest.importorskip("torchaudio")

PANNS = {"window": 1024, "hop": 320, "lowest": 50, "highest": 14000, "scale": "slaney"}
CED = {"window": 512, "hop": 160, "lowest": 0, "highest": 8000, "scale": "htk", "dynamic_range": 120}


def test_panns_spectrogram_against_numpy():
    """Reflected ends, a periodic Hann window, the mel filters of transformers, decibels; in float64."""
    waveform = noise(1, 0.5, 32000)[0].double().numpy()
    padded = np.pad(waveform, 512, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 1024)[::320]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    filters = transformers.audio_utils.mel_filter_bank(
        513, 64, 50, 14000, 32000, norm="slaney", mel_scale="slaney"
    )
    expected = 10 * np.log10(np.maximum(power @ filters, 1e-10))
    found = LogMel(32000, **PANNS)(torch.from_numpy(waveform).float().unsqueeze(0))[0]
    assert found.shape == (51, 64)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


def test_ced_spectrogram_as_its_own_code_makes_it():
    waveform = noise(1, 0.5, 16000)
    waveform[0, 4000:] = 0
    transforms = torchaudio.transforms
    power = transforms.MelSpectrogram(16000, n_fft=512, hop_length=160, f_min=0, f_max=8000, n_mels=64)
    expected = transforms.AmplitudeToDB(top_db=120)(power(waveform))
    found = LogMel(16000, **CED)(waveform)
    torch.testing.assert_close(found.transpose(1, 2), expected)
    assert found.max() - LogMel(16000, **(CED | {"dynamic_range": 50}))(waveform).min() < 50.001


def test_a_spectrogram_does_not_depend_on_louder_companions():
    quiet = 1e-4 * noise(1, 0.5, 16000)
    quiet[0, 4000:] = 0
    together = LogMel(16000, **(CED | {"dynamic_range": 20}))(torch.cat([quiet, 1e6 * quiet]))
    alone = LogMel(16000, **(CED | {"dynamic_range": 20}))(quiet)
    torch.testing.assert_close(together[:1], alone)


def test_constants_are_in_no_checkpoint_and_stay_float32():
    waveform = noise(2, 0.2, 44100)
    plain = torch.nn.Sequential()
    plain.add_module("log_mel", LogMel(32000, **PANNS))
    plain.add_module("resample", Resample(44100, 32000))
    assert not plain.state_dict()
    expected = plain.log_mel(plain.resample(waveform)[0])
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain.log_mel(plain.resample(waveform)[0]), expected)
    plain.to(torch.bfloat16)
    assert torch.equal(plain.log_mel(plain.resample(waveform)[0]), expected)
    assert all(buffer.dtype == torch.float32 for buffer in plain.buffers())
    assert all(buffer.device.type == "meta" for buffer in plain.to("meta").buffers())


def test_clips_that_are_too_short_are_filled_with_silence():
    transform = LogMel(32000, min_frames=32, **PANNS)
    for samples in (1, 512, 2000):
        waveform = noise(1, samples / 32000, 32000)
        found = transform(waveform)
        assert found.shape == (1, 32, 64)
        assert transform.num_frames(torch.tensor([samples])).item() == 32
        assert (found[0, -1] == -100).all()


def test_resampling_keeps_the_pitch_and_counts_samples():
    time = torch.arange(8000) / 16000
    resampled, counts = Resample(16000, 32000)(
        torch.sin(2 * torch.pi * 1000 * time).unsqueeze(0), torch.tensor([4001])
    )
    assert resampled.shape == (1, 16000)
    assert counts.tolist() == [8002]
    assert torch.fft.rfft(resampled[0]).abs().argmax().item() == 500
    assert Resample(48000, 44100)(torch.zeros(1, 480), torch.tensor([101]))[1].tolist() == [93]
    waveform = torch.rand(2, 100)
    same, none = Resample(16000, 16000)(waveform)
    assert torch.equal(same, waveform)
    assert none is None


def test_log_mel_with_natural_logarithm():
    """The spectrograms of synthetic data: windows of 32 ms every 16 ms, bands from 50 Hz, a floor of 1e-5."""
    waveform = noise(2, 0.5, 16000)
    waveform[:, 4000:] = 0
    transforms = torchaudio.transforms
    power = transforms.MelSpectrogram(16000, n_fft=512, hop_length=256, f_min=50, n_mels=40)(waveform)
    found = log_mel(waveform, num_mels=40)
    assert torch.equal(found, power.clamp_min(1e-5).log().transpose(1, 2))
    assert found.shape[1] == num_frames(8000)
    assert found.min() == SILENCE
    for samples in (1, 256, 300, 512):
        assert log_mel(waveform[:, :samples]).shape[1] == num_frames(samples)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resample(0, 16000), "`from_rate` has to be an integer of at least 1, but got 0"),
        (lambda: Resample(16000, 0), "`to_rate` has to be an integer of at least 1, but got 0"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
