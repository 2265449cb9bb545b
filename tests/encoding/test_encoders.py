"""Which methods are taken for the encoders of a model."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import ask_lightning.module
from ask_lightning import ASKModule
from ask_lightning.callbacks import DriftMap
from ask_lightning.encoding.encoders import ENCODER_PAIRS, find_encoders, find_pair_encoder
from ask_lightning.encoding.target import find_target
from tests.helpers.clients import SelfContained, Towers, make_loader, make_refresh, make_trainer, wrap


class Bare(pl.LightningModule):
    """Two encoders whose methods are added under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"audio": nn.Linear(12, 8), "text": nn.Linear(10, 8)})

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def encoder(side):
    return lambda self, batch: self.layers[side](batch[side])


def model_with(*names: str) -> Bare:
    methods = {name: encoder("audio" if "audio" in name else "text") for name in names}
    return type("Model", (Bare,), methods)()


@pytest.mark.parametrize("pair", ENCODER_PAIRS)
def test_each_pair_trains(pair, monkeypatch):
    said = []
    monkeypatch.setattr(ask_lightning.module, "rank_zero_info", said.append)
    module = wrap(model_with(*pair))
    batch = next(iter(make_loader()))
    audio, text, _ = module.embed_pairs(batch)
    assert torch.equal(audio, module.model.layers["audio"](batch["audio"]))
    assert torch.equal(text, module.model.layers["text"](batch["text"]))
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert said == [f"ASKModule takes the embeddings from `{pair[0]}` and `{pair[1]}` of Model."]


def test_nothing_is_said_of_encoders_that_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(ask_lightning.module, "rank_zero_info", said.append)
    module = wrap(model_with(*ENCODER_PAIRS[0]), audio="encode_audio", text="encode_text")
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert not said


def test_earlier_pairs_come_first():
    for number, pair in enumerate(ENCODER_PAIRS):
        names = [name for later in ENCODER_PAIRS[number:] for name in later]
        assert find_encoders(model_with(*reversed(names))) == pair


def test_half_a_pair_is_passed_over():
    assert find_encoders(model_with("encode_audio", "forward_audio", "forward_text")) == ENCODER_PAIRS[1]


def test_what_is_not_callable_is_no_method():
    model = model_with("forward_audio", "forward_text")
    model.encode_audio = model.encode_text = True
    assert find_encoders(model) == ENCODER_PAIRS[1]


def test_nothing_found():
    with pytest.raises(ValueError, match=r"ASKModule found no methods of Model that encode") as caught:
        ASKModule(model_with())
    message = str(caught.value)
    for audio, text in ENCODER_PAIRS:
        assert f"`{audio}`/`{text}`" in message
    assert 'Name the methods: ASKModule(..., audio="...", text="...").' in message
    assert (
        'ASKModule(..., step="encode", audio=lambda model, batch: model.part.encode_audio(batch)' in message
    )
    assert "It has" not in message


def test_pairs_do_not_mix():
    with pytest.raises(
        ValueError, match=r"It has `encode_audio` and `forward_text`, which are not of one pair\. Name"
    ):
        ASKModule(model_with("encode_audio", "forward_text"))


@pytest.mark.parametrize("side", [0, 1])
def test_one_given(side):
    argument = ("audio", "text")[side]
    every = [name for pair in ENCODER_PAIRS for name in pair]

    def find(names, given):
        return find_encoders(model_with(*names), **{argument: given})[1 - side]

    for pair in ENCODER_PAIRS:
        assert find(every, pair[side]) == pair[1 - side], "the partner"
    mine = f"my_{argument}"
    assert find([*every, mine], mine) == ENCODER_PAIRS[0][1 - side], "the first for its side"
    assert find([ENCODER_PAIRS[2][1 - side], mine], mine) == ENCODER_PAIRS[2][1 - side]
    assert find(every, lambda model, batch: batch) == ENCODER_PAIRS[0][1 - side]


def test_one_given_and_the_other_not_found():
    model = model_with("encode_audio", "forward_text", "listen")
    with pytest.raises(
        ValueError,
        match=r"`text` of ASKModule has to be given beside audio='encode_audio', because Model has no method "
        r"`encode_text`\.",
    ):
        ASKModule(model, audio="encode_audio")
    with pytest.raises(ValueError, match=r"`audio` of ASKModule .* `encode_audio` or `forward_audio` or"):
        ASKModule(model_with("read"), text="read")


def test_a_name_that_is_no_method():
    with pytest.raises(ValueError, match=r"`audio` of ASKModule has to name a method of Towers .* 'listen'"):
        ASKModule(Towers(), audio="listen")


def test_what_to_write_in_place_of_a_name_that_is_no_method():
    with pytest.raises(ValueError, match=r"no method 'encode_audoi'\. Did you mean 'encode_audio'\?$"):
        ASKModule(Towers(), audio="encode_audoi")
    with pytest.raises(ValueError, match=r"text=lambda model, batch: model\.clap\.encode_text\(batch\)\.$"):
        ASKModule(Towers(), text="clap.encode_text")


def test_a_module_that_calls_the_loss_itself_may_have_any_pair():
    class Client(SelfContained):
        encode_audio = encode_text = None

        def get_audio_features(self, batch):
            return self.audio_encoder(batch["audio"])

        def get_text_features(self, batch):
            return self.text_encoder(batch["text"])

        def training_step(self, batch, batch_idx):
            return self.objective(self.get_audio_features(batch), self.get_text_features(batch))

        validation_step = pl.LightningModule.validation_step

    model = Client()
    batch = next(iter(make_loader()))
    audio, _, ids = find_target(model).embed(batch)
    assert torch.equal(audio, model.get_audio_features(batch))
    assert ids is None
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(model, make_loader())
    assert model.objective.knowledge is not None


def test_callbacks_find_encoders_by_the_same_rule():
    trainer = make_trainer()
    DriftMap().setup(trainer, model_with("forward_audio", "forward_text"), "fit")
    DriftMap().setup(trainer, ASKModule(model_with("forward_audio", "forward_text")), "fit")
    with pytest.raises(ValueError, match=r"DriftMap found no methods of Model.*DriftMap\(\.\.\., audio="):
        DriftMap().setup(trainer, model_with("encode_audio"), "fit")


def test_callbacks_take_the_encoders_that_the_wrapper_was_given():
    """A model whose methods have names of its own, which only the wrapper knows."""
    model = model_with("audio_of", "text_of")
    type(model).validation_step = lambda self, batch, batch_idx: None
    module = wrap(model, audio="audio_of", text="text_of", step="encode")
    drift_map = DriftMap(num_clips=4)
    make_trainer(max_epochs=2, callbacks=[make_refresh(), drift_map]).fit(
        module, make_loader(), make_loader()
    )
    assert drift_map.state_dict()["epochs"] == [0, 1]


def test_pairs_are_embedded_by_the_module_or_by_its_encoders():
    model = model_with("encode_audio", "encode_text")
    batch = {"audio": torch.randn(3, 12), "text": torch.randn(3, 10), "id": torch.arange(3)}
    expected = model.encode_audio(batch), model.encode_text(batch)
    for module in (model, ASKModule(model)):
        found = find_pair_encoder(module)(batch)
        assert len(found) == 2
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="found no methods"):
        find_pair_encoder(Bare())
