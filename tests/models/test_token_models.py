"""The published backbones with frames and words."""

from functools import partial

import pytest
import torch

from ask_lightning import ASKModule, ReliabilityOTLoss
from ask_lightning.interaction import (
    FrameWiseInteraction,
    LateInteraction,
    PrototypeAttention,
    TokenEmbeddings,
)
from ask_lightning.models import ResNet38BERT
from tests.helpers.retrievers import CAPTIONS, ced_sonar, resnet38_bert

KINDS = {"prototypes": PrototypeAttention, "frames": FrameWiseInteraction}


def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(4, 64000, generator=generator)
    num_samples = torch.tensor([64000, 30000, 45000, 64000])
    waveform[torch.arange(64000) >= num_samples[:, None]] = 0
    return {"waveform": waveform, "num_samples": num_samples, "caption": CAPTIONS, "clip_id": torch.arange(4)}


# 201 spectra of 10 ms at 32 kHz, 401 at 16 kHz; and how many frames the clips of the batch have.
MODELS = {
    "resnet38_bert": (resnet38_bert, [6, 2, 4, 6]),
    "ced_sonar": (ced_sonar, [25, 11, 17, 25]),
    "ced_sonar_pieces": (partial(ced_sonar, max_frames=144), [25, 11, 17, 25]),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    torch.manual_seed(0)
    make, counts = MODELS[request.param]
    return make, make(interaction="prototypes").eval(), counts


@pytest.fixture
def model(made):
    return made[1]


@torch.no_grad()
def test_pooled_embeddings_are_those_without_interaction(made):
    make, model, counts = made
    plain = make().eval()
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if "interaction" not in name})
    audio, text = model.encode_audio(batch()), model.encode_text(batch())
    assert torch.equal(audio.pooled, plain.encode_audio(batch()))
    assert torch.equal(text.pooled, plain.encode_text(batch()))
    assert audio.valid.sum(dim=1).tolist() == counts
    assert text.tokens.shape[2] == 8
    for side in (audio, text):
        torch.testing.assert_close(side.tokens.norm(dim=2), torch.ones(side.tokens.shape[:2]))


@torch.no_grad()
def test_tokens_do_not_depend_on_the_batch(model):
    whole = batch()
    audio, text = model.encode_audio(whole), model.encode_text(whole)
    alone = {
        "waveform": whole["waveform"][1:2, :30000],
        "num_samples": whole["num_samples"][1:2],
        "caption": CAPTIONS[:1],
    }
    frames, words = model.encode_audio(alone), model.encode_text(alone)
    torch.testing.assert_close(audio.tokens[1][audio.valid[1]], frames.tokens[0][frames.valid[0]])
    torch.testing.assert_close(text.tokens[0][text.valid[0]], words.tokens[0][words.valid[0]])


@torch.no_grad()
@pytest.mark.parametrize(("make", "num_spectra"), [(resnet38_bert, 40), (ced_sonar, 20)])
def test_a_frame_is_encoded_like_a_clip_of_one_frame(make, num_spectra):
    """Maximum and mean over time of one frame."""
    spectrogram = torch.randn(2, num_spectra, 64, generator=torch.Generator().manual_seed(1))
    clips, frames, inside = make().eval().audio_encoder.with_frames(spectrogram)
    assert frames.shape[1] == 1
    assert inside.all()
    torch.testing.assert_close(frames[:, 0], clips)


@torch.no_grad()
def test_pieces_of_a_long_clip_have_their_own_frames():
    """Of CED, which encodes each piece as if it were a clip, and leaves pieces of padding out."""
    torch.manual_seed(0)
    encoder = ced_sonar(max_frames=48).audio_encoder.eval()
    spectrogram = torch.randn(2, 120, 64)
    clips, frames, inside = encoder.with_frames(spectrogram, torch.tensor([120, 40]))
    assert inside.tolist() == [[True] * 7 + [False] * 2, [True] * 2 + [False] * 7]
    first, second, last = (encoder.with_frames(piece)[1] for piece in spectrogram[:1].split(48, dim=1))
    torch.testing.assert_close(frames[:1, :7], torch.cat([first, second, last], dim=1))
    torch.testing.assert_close(clips[0], torch.stack([p[0].mean(0) for p in (first, second, last)]).mean(0))
    torch.testing.assert_close(clips[1], frames[1, :2].mean(dim=0))


@torch.no_grad()
def test_padding_that_is_heard_has_frames():
    torch.manual_seed(0)
    encoder = ced_sonar(max_frames=48, padding="heard").audio_encoder.eval()
    for spectra, count in ((48, 3), (96, 3), (100, 9)):
        clips, frames, inside = encoder.with_frames(torch.randn(2, spectra, 64), torch.tensor([16, 16]))
        assert inside.shape == (2, count)
        assert inside.all()
        torch.testing.assert_close(clips, frames.mean(dim=1))


@pytest.mark.parametrize("make", [resnet38_bert, ced_sonar])
@pytest.mark.parametrize("interaction", KINDS)
def test_step_and_metrics_use_the_interaction(interaction, make):
    torch.manual_seed(0)
    model = make(interaction=interaction).train()
    assert type(model.interaction) is KINDS[interaction]
    assert model.val_metrics.interaction is model.interaction
    audio, text = model.encode_audio(batch()), model.encode_text(batch())
    to_audio = model.interaction(text, audio).to_audio / model.temperature
    labels = torch.arange(4)
    wanted = sum(torch.nn.functional.cross_entropy(scores, labels) for scores in (to_audio, to_audio.T)) / 2
    loss = model.loss(audio, text)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    learnt = dict(model.interaction.named_parameters())
    assert all(weight.grad is not None for weight in learnt.values())
    # What is added to all scores alike cancels out, up to rounding.
    assert all(weight.grad.any() for name, weight in learnt.items() if name != "bias.bias")
    model.eval().validation_step(batch(), 0)
    assert model.val_metrics.compute()["t2a/median_rank"] >= 1


def test_ask_uses_the_models_interaction():
    model = resnet38_bert(interaction="prototypes")
    module = ASKModule(model, ReliabilityOTLoss(2, interaction="interaction"))
    audio, text, _ = module.embed_pairs(batch())
    assert audio.shape == text.shape == (4, 8)


def test_checkpoint_arguments_build_the_interaction():
    model = resnet38_bert(interaction="frames")
    again = ResNet38BERT(**model.hparams)
    again.load_state_dict(model.state_dict())
    assert type(again.interaction) is FrameWiseInteraction


def test_other_interactions():
    model = resnet38_bert()
    model.compare_by(LateInteraction())
    assert isinstance(model.encode_text(batch()), TokenEmbeddings)
    with pytest.raises(ValueError, match="`interaction` has to be one of"):
        resnet38_bert(interaction="words")
    model = ced_sonar()
    model.audio_encoder = torch.nn.Identity()
    with pytest.raises(TypeError, match="LateInteraction compares frames, but Identity returns clips alone"):
        model.compare_by(LateInteraction())
