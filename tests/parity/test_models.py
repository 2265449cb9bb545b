"""The models against recorded outputs of the public code of their baselines; README.md says which."""

import json

import pytest
import torch

from ask_lightning.models.text import TextEncoder
from tests.helpers.retrievers import ced_sonar, resnet38_bert
from tests.parity import inputs
from tests.parity.record import RECORDED

PUBLIC = json.loads(RECORDED.read_text(encoding="utf-8"))


@torch.no_grad()
def test_resnet38_from_waveforms():
    """ML-ACT hears the padding of a batch."""
    sizes = {"channels": inputs.RESNET38["channels"], "blocks": inputs.RESNET38["blocks"]}
    model = resnet38_bert(padding="heard", audio_width=inputs.RESNET38["width"], **sizes).eval()
    inputs.fill(model.audio_encoder)
    features = model.audio_encoder(model.log_mel(inputs.waveforms(32000, 2.0, 1.3)))
    expected = torch.tensor(PUBLIC["audio-text_retrieval"]["resnet38"])
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)


def ced_features(padding: str, seconds: float) -> torch.Tensor:
    sizes = {f"audio_{name}": size for name, size in inputs.CED.items()}
    model = ced_sonar(padding=padding, **sizes).eval()
    inputs.fill(model.audio_encoder, lambda name: name.replace("init_bn.", "init_bn.1."))
    with torch.no_grad():
        return model.audio_encoder(model.log_mel(inputs.waveforms(16000, seconds)))[0]


@pytest.mark.parametrize("seconds", inputs.CED_SECONDS)
@pytest.mark.parametrize("source", ["CED", "ml-clap"])
def test_ced_from_waveforms(seconds, source):
    """The last piece of 25 s is filled with zeros; that of 20.23 s, which needs no filling, is left out."""
    expected = torch.tensor(PUBLIC[source]["features"][str(seconds)])
    torch.testing.assert_close(ced_features("heard", seconds), expected, rtol=1e-3, atol=1e-3)
    if seconds <= 10.11:
        torch.testing.assert_close(ced_features("masked", seconds), expected, rtol=1e-3, atol=1e-3)


class States(torch.nn.Module):
    """A model of transformers that returns given states."""

    device = None

    def __init__(self, states):
        super().__init__()
        self.states = states

    def forward(self, **_):
        return type("Output", (), {"last_hidden_state": self.states})


def test_the_mean_over_sonars_tokens():
    states, lengths = inputs.tokens()
    mask = (torch.arange(states.shape[1]) < torch.tensor(lengths)[:, None]).long()
    encoder = TextEncoder(States(states), lambda captions, device: (mask, mask), "mean")
    expected = torch.tensor(PUBLIC["SONAR"]["mean"])
    torch.testing.assert_close(encoder(["", "", ""]), expected, rtol=1e-5, atol=1e-6)
