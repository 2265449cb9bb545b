"""`SigmoidLoss` against its equation and SigLIP in `transformers`, its limits, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from ask_lightning import SigmoidLoss
from tests.helpers.pair_cases import CLIPS, pairs, roles, similarities

TEMPERATURE, BIAS = 0.3, -1.5


@pytest.mark.parametrize("positives", ["diagonal", "ids", "same_clip"])
def test_it_is_the_equation(positives):
    audio, text = pairs()
    parts = {1: 0.0, -1: 0.0}
    scores = similarities(audio, text)["t2a"]
    for i in range(len(scores)):
        for label, members in zip((1, -1), roles(positives, i), strict=True):
            for j in members:
                parts[label] += math.log1p(math.exp(-label * (scores[i][j] / TEMPERATURE + BIAS))) / len(
                    scores
                )
    loss = SigmoidLoss(TEMPERATURE, BIAS, positives=positives)
    value = loss(audio, text, ids=CLIPS if loss.needs_ids else None)
    assert value.item() == pytest.approx(parts[1] + parts[-1], rel=1e-12)
    assert loss.last["loss_positives"].item() == pytest.approx(parts[1], rel=1e-12)
    assert loss.last["loss_negatives"].item() == pytest.approx(parts[-1], rel=1e-12)


def test_it_is_the_loss_of_siglip_in_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    torch.manual_seed(0)
    model = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config=sizes | {"vocab_size": 20, "max_position_embeddings": 4},
            vision_config=sizes | {"image_size": 4, "patch_size": 2},
        )
    ).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.2)
        model.logit_bias.fill_(-2.0)
        output = model(
            input_ids=torch.randint(20, (5, 4)), pixel_values=torch.randn(5, 3, 4, 4), return_loss=True
        )
    loss = SigmoidLoss(lambda model: 1 / model.logit_scale.exp(), "logit_bias")
    loss.bind(model)
    value = loss(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(value, output.loss)


def test_a_very_low_bias_leaves_the_positives():
    audio, text = pairs()
    loss = SigmoidLoss(TEMPERATURE, bias=-60.0)
    scores = similarities(audio, text)["t2a"]
    expected = 60 - scores.diagonal().mean() / TEMPERATURE
    assert loss(audio, text).item() == pytest.approx(expected, rel=1e-10)


def test_gradients_are_those_of_finite_differences():
    audio, text = pairs()
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (TEMPERATURE, BIAS)]

    def value(audio, text, temperature, bias):
        return SigmoidLoss(lambda: temperature, lambda: bias, positives="same_clip")(audio, text, ids=CLIPS)

    assert torch.autograd.gradcheck(value, [part.requires_grad_() for part in (audio, text, *scalars)])


def test_the_models_own_bias_is_learned_and_registered_once():
    bias = nn.Parameter(torch.tensor(-10.0))
    loss = SigmoidLoss(0.1, bias)
    assert loss.bias is bias
    assert not list(loss.parameters())
    assert loss.borrowed_parameters == {"bias": bias}
    loss(*(side.float() for side in pairs())).backward()
    assert bias.grad != 0


def test_options_that_a_file_can_hold():
    assert SigmoidLoss(0.2, -3).options == {
        "temperature": 0.2,
        "bias": -3.0,
        "positives": "diagonal",
        "gather": False,
    }
    options = SigmoidLoss(0.2, nn.Parameter(torch.tensor(-10.0))).options
    assert options["bias"] is None
    with pytest.raises(ValueError, match=r"The loss had a bias that a file cannot hold. Pass `loss=SigmoidL"):
        SigmoidLoss.from_options(options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "`temperature` has to be positive, but got -1.0"),
        ({"bias": "-10"}, TypeError, "`bias` has to be a number, the name of an attribute of the model"),
        ({"bias": torch.zeros(2)}, TypeError, "`bias` has to be .* a parameter with one element"),
    ],
)
def test_what_it_refuses(options, error, message):
    with pytest.raises(error, match=message):
        SigmoidLoss(**options)
