"""The front ends against independent references; constants; SpecAugment."""

import numpy as np
import pytest
import torch

from ask_lightning.models.frontend import LogMel, Resample, SpecAugment
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
    log_mel = LogMel(32000, min_frames=32, **PANNS)
    for samples in (1, 512, 2000):
        waveform = noise(1, samples / 32000, 32000)
        found = log_mel(waveform)
        assert found.shape == (1, 32, 64)
        assert log_mel.num_frames(torch.tensor([samples])).item() == 32
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


def test_spec_augment():
    torch.manual_seed(0)
    augment = SpecAugment(time_width=20, band_width=8)
    masked = augment(torch.ones(200, 100, 64)) == 0
    frames, bins = masked.all(dim=2), masked.all(dim=1)
    assert torch.equal(masked, frames.unsqueeze(2) | bins.unsqueeze(1))
    for silent, width in ((frames, 20), (bins, 8)):
        sizes = silent.sum(dim=1)
        assert sizes.max() <= 2 * width
        assert sizes.max() > 1.5 * width
        assert 0.8 * width < sizes.float().mean() < 1.1 * width
        edges = torch.nn.functional.pad(silent.int(), (1, 1)).diff(dim=1).abs().sum(dim=1)
        assert edges.max() == 4, "two stretches"
        assert len(silent.unique(dim=0)) > 100, "others in each example"
        assert silent[:, 0].any()
        assert silent[:, -1].any()
    assert torch.equal(augment.eval()(torch.ones(2, 300, 64)), torch.ones(2, 300, 64))
    short = SpecAugment(count=1)(torch.ones(50, 10, 64)) == 0
    assert short.all(dim=2).sum(dim=1).max() == 5, "no more than half"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resample(0, 16000), "`sample_rate` has to be at least 1 Hz, but got 0"),
        (lambda: Resample(16000, 0), "`to_rate` has to be at least 1 Hz, but got 0"),
        (lambda: SpecAugment(band_width=-1), "`band_width` has to be at least 0, but got -1"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
