"""ML-CLAP's own loss: a temperature that is trained, and an embedding regulariser; and SONAR's dropout."""

import math

import pytest
import torch
from torch import nn

from ask_lightning import ASKModule
from ask_lightning.losses import NTXentLoss
from ask_lightning.models.retriever import embedding_spread
from tests.helpers.retrievers import SONAR, batch_for, ced_sonar


def quiet(**options):
    """A model in evaluation mode whose training step logs nothing."""
    torch.manual_seed(0)
    model = ced_sonar(**options).eval()
    model.log = lambda *arguments, **logged: None
    return model


def test_the_loss_of_the_public_code():
    """`MLCLAP.forward` and `AudioTextContrastiveLoss`, github.com/zyyan4/ml-clap at 154393e, in float64."""
    model = quiet(learn_temperature=True, embedding_regularizer=1.0, temperature=0.2)
    batch = batch_for(model)
    loss = model.training_step(batch, 0)
    audio, text = (side.detach().double() for side in (model.encode_audio(batch), model.encode_text(batch)))
    logits, own = audio @ text.T / 0.2, torch.arange(len(audio))
    expected = -(logits.log_softmax(1)[own, own] + logits.T.log_softmax(1)[own, own]).mean() / 2
    for side in (audio, text):
        expected = expected + side.abs().mean() / side.square().sum().sqrt()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert isinstance(model.temperature, nn.Parameter)
    assert model.temperature.grad.abs() > 0
    (group,) = model.configure_optimizers()["optimizer"].param_groups
    assert any(weight is model.temperature for weight in group["params"])


def test_both_are_off_by_default():
    model = ced_sonar()
    assert model.temperature == 0.07
    assert model.embedding_regularizer == 0
    assert "temperature" not in model.state_dict()


def test_the_spread_of_unit_vectors():
    flat, peaked = torch.full((3, 16), 0.25), torch.eye(16)[:3]
    assert embedding_spread(flat).item() == pytest.approx(1 / math.sqrt(16 * 3))
    assert embedding_spread(peaked).item() == pytest.approx(1 / (16 * math.sqrt(3)))


def test_a_checkpoint_holds_the_learned_temperature():
    model = ced_sonar(learn_temperature=True)
    with torch.no_grad():
        model.temperature.fill_(0.3)
    other = ced_sonar(**model.hparams)
    other.load_state_dict(model.state_dict())
    assert other.temperature.item() == pytest.approx(0.3)


def test_another_loss_takes_the_temperature_and_keeps_the_regulariser():
    model = quiet(learn_temperature=True, embedding_regularizer=2.0)
    module = ASKModule(model, NTXentLoss(temperature=model.temperature), criterion="loss")
    batch = batch_for(model)
    torch.testing.assert_close(module.training_step(batch, 0), model.training_step(batch, 0))


def dropout(model):
    return model.text_encoder.model.layers[0].activation_dropout


def test_dropout_behind_the_activation():
    """`activation_dropout_p` of SONAR's encoders in fairseq2 is 0.1 (github.com/facebookresearch/SONAR)."""
    model = ced_sonar(activation_dropout=0.1)
    assert dropout(ced_sonar()) == 0
    assert dropout(model) == 0.1
    assert dropout(ced_sonar(**model.hparams)) == 0.1
    assert dropout(ced_sonar(activation_dropout=0.1, text_config=SONAR | {"activation_dropout": 0.2})) == 0.2
    with pytest.raises(ValueError, match=r"`activation_dropout` has to be in \[0, 1\), but got 1.0"):
        ced_sonar(activation_dropout=1.0)


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="`embedding_regularizer` has to be"):
        ced_sonar(embedding_regularizer=-1.0)
