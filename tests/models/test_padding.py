"""Padding that is heard, as in the public code of ML-ACT, CED and ML-CLAP."""

import pytest
import torch
from torch.nn.functional import pad

from ask_lightning.models import CED
from tests.helpers.retrievers import ced_sonar, noise, resnet38_bert


@pytest.mark.parametrize("make", [resnet38_bert, ced_sonar])
def test_heard_padding_is_encoded_like_sound(make):
    torch.manual_seed(0)
    masked = make().eval()
    heard = make(padding="heard").eval()
    heard.load_state_dict(masked.state_dict())
    rate = masked.resample.from_rate
    waveform = pad(noise(2, 0.75, rate), (0, rate // 2))
    counted = {"waveform": waveform, "num_samples": torch.tensor([rate * 3 // 4] * 2)}
    uncounted = {"waveform": waveform}
    assert torch.equal(heard.encode_audio(counted), heard.encode_audio(uncounted))
    assert torch.equal(heard.encode_audio(uncounted), masked.encode_audio(uncounted))
    assert (heard.encode_audio(counted) - masked.encode_audio(counted)).norm() > 1e-3


@pytest.mark.parametrize("seconds", [5, 10.12, 15, 20.24, 25, 30.36])
def test_ced_cuts_long_clips_as_the_public_code(seconds):
    """`forward_spectrogram` of `AudioTransformer`, github.com/RicherMans/CED at 60a0f54.

    Pieces of 1012 frames; the last one is filled with zeros, behind the batch normalisation, and left out if
    it needs none; all pieces count the same.
    """
    torch.manual_seed(0)
    encoder = CED(8, 2, 2, padding="heard").eval()
    encoder.init_bn.running_mean.normal_()
    frames = round(100 * seconds)
    spectrogram = torch.randn(2, frames, 64)
    found = encoder(spectrogram, torch.tensor([frames, 20]))
    whole, rest = frames // 1012, frames % 1012
    if frames <= 1012:
        pieces = [spectrogram]
    else:
        pieces = [spectrogram[:, 1012 * piece : 1012 * (piece + 1)] for piece in range(whole)]
        if rest:
            # What batch normalisation turns into zeros.
            filled = encoder.init_bn.running_mean.expand(2, 1012, 64).clone()
            filled[:, :rest] = spectrogram[:, -rest:]
            pieces.append(filled)
        else:
            pieces.pop()
    masked = CED(8, 2, 2).eval()
    masked.load_state_dict(encoder.state_dict())
    expected = torch.stack([masked(piece) for piece in pieces]).mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if frames > 1012:
        assert (found - masked(spectrogram)).norm() > 1e-3, "the masked way differs"


@pytest.mark.parametrize("make", [resnet38_bert, ced_sonar, lambda padding: CED(8, 1, 2, padding=padding)])
def test_other_words_are_refused(make):
    with pytest.raises(ValueError, match=r"`padding` has to be .*, but got 'ignored'"):
        make(padding="ignored")
