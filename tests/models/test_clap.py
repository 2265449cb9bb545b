"""CLAP: its spectrograms against those of transformers."""

import numpy as np
import pytest
import torch

from ask_lightning.models import CLAPRetriever
from tests.helpers.retrievers import CLAP, FUSED, clap, noise

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("max_seconds", [0.0, 2.56])
def test_clap_cannot_hear_more_than_its_input_holds(max_seconds):
    with pytest.raises(ValueError, match=r"`max_seconds` has to be above 0 and at most 2.55 .* 256 frames"):
        clap(max_seconds=max_seconds)


def extractor(truncation: str, num_mels: int = 16) -> "transformers.ClapFeatureExtractor":
    return transformers.ClapFeatureExtractor(
        feature_size=num_mels, max_length_s=1, frequency_min=50, truncation=truncation, padding="repeatpad"
    )


@pytest.mark.parametrize(("config", "truncation"), [(CLAP, "rand_trunc"), (FUSED, "fusion")])
@pytest.mark.parametrize("seconds", [0.3, 0.71, 1.0])
def test_clap_hears_what_transformers_extracts(config, truncation, seconds):
    model = clap(config=config).eval()
    clip = noise(1, seconds, 48000)[0]
    expected = extractor(truncation)(clip.numpy(), sampling_rate=48000, return_tensors="np")["input_features"]
    padded = torch.nn.functional.pad(clip, (0, 500)).unsqueeze(0)
    found, is_longer = model.spectrograms(padded, torch.tensor([len(clip)]))
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-3)
    assert not is_longer.any()


def test_clap_hears_parts_of_long_clips():
    model = clap().eval()
    clip = noise(2, 1.5, 48000)
    middle = model.spectrograms(clip[:, 12000:60000], torch.tensor([48000, 48000]))[0]
    torch.testing.assert_close(model.spectrograms(clip, torch.tensor([72000, 72000]))[0], middle)
    torch.manual_seed(0)
    model.train()
    one, other = (model.spectrograms(clip, torch.tensor([72000, 72000]))[0] for _ in range(2))
    assert not torch.equal(one, other)


def test_clap_with_fusion_also_hears_the_whole(monkeypatch):
    """In transformers, numpy draws one part of each third of the clip; here it takes the middle one."""
    larger = FUSED["audio_config"] | {"num_mel_bins": 64, "spec_size": 256}
    model = clap(config=FUSED | {"audio_config": larger}).eval()
    clip = noise(2, 1.8, 48000)
    lengths = torch.tensor([48000, 80000])
    monkeypatch.setattr(np.random, "choice", lambda options: options[len(options) // 2])
    expected = extractor("fusion", 64)(
        clip[1, :80000].numpy(), sampling_rate=48000, return_tensors="np", max_length=48000
    )["input_features"]
    found, is_longer = model.spectrograms(clip, lengths)
    assert is_longer.tolist() == [[False], [True]]
    assert found.shape == (2, 4, 101, 64)
    np.testing.assert_allclose(found[1].numpy(), expected[0], atol=5e-3)
    embeddings = model.encode_audio({"waveform": clip, "num_samples": lengths})
    assert embeddings.isfinite().all()
    assert isinstance(model, CLAPRetriever)
