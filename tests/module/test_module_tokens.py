"""Models whose encoders return tokens, under `ASKModule` and the refresh."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ask_lightning import ASKModule, KnowledgeDistillationLoss, NTXentLoss, ReliabilityOTLoss, TripletLoss
from ask_lightning.encoding.encoders import find_pair_encoder
from ask_lightning.functional import nt_xent
from ask_lightning.interaction import PrototypeAttention, Similarities, TokenEmbeddings
from tests.helpers.clients import WIDTH, Pairs, Towers, make_loader, make_refresh, make_trainer

FRAMES, WORDS = 3, 2


class TokenTowers(Towers):
    """Reads three frames out of its audio and two words out of its text; compares them by prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_encoder, self.text_encoder = nn.Linear(4, WIDTH), nn.Linear(5, WIDTH)
        self.interaction = PrototypeAttention(WIDTH, 4)
        self.losses: list[float] = []

    def encode_audio(self, batch) -> TokenEmbeddings:
        frames = self.audio_encoder(batch["audio"].view(-1, FRAMES, 4))
        return TokenEmbeddings(frames.mean(dim=1), frames)

    def encode_text(self, batch) -> TokenEmbeddings:
        words = self.text_encoder(batch["text"].view(-1, WORDS, 5))
        return TokenEmbeddings(words.mean(dim=1), words, torch.ones(words.shape[:2], dtype=torch.bool))

    def contrast(self, audio: TokenEmbeddings, text: TokenEmbeddings) -> Tensor:
        found: Similarities = self.interaction(text.unit_length(), audio.unit_length())
        return 0.5 * (nt_xent(found.to_audio) + nt_xent(found.to_text))


class WithStep(TokenTowers):
    def training_step(self, batch, batch_idx):
        return self.contrast(self.encode_audio(batch), self.encode_text(batch))


class WithCriterion(TokenTowers):
    def training_step(self, batch, batch_idx):
        audio = self.encode_audio(batch)
        return self.contrast(audio, self.encode_text(batch)) + 0.01 * audio.pooled.square().mean()


MODELS = {"capture": WithStep, "encode": WithStep, "criterion": WithCriterion}
LOSSES = {
    "contrast": lambda: NTXentLoss(interaction="interaction"),
    "ask": lambda: ReliabilityOTLoss(4, interaction="interaction"),
    "teacher": lambda: KnowledgeDistillationLoss(interaction="interaction"),
}


def wrapped(step: str, loss: str) -> ASKModule:
    torch.manual_seed(0)
    options = {"criterion": "contrast"} if step == "criterion" else {"step": step}
    return ASKModule(MODELS[step](), LOSSES[loss](), ids="clip_id", **options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("step", MODELS)
def test_fit_in_each_step_mode(step, loss):
    module = wrapped(step, loss)
    before = copy.deepcopy(module.model)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    for name, weight in module.model.named_parameters():
        assert not torch.equal(weight, before.get_parameter(name)), f"{name} is trained"
    base = module.loss.knowledge
    if loss == "contrast":
        return
    pairs = Pairs()
    audio, text = before.encode_audio({"audio": pairs.audio}), before.encode_text({"text": pairs.text})
    torch.testing.assert_close(base.fine.audio, F.normalize(audio.pooled, dim=1).detach())
    torch.testing.assert_close(base.fine.text, F.normalize(text.pooled, dim=1).detach())


@pytest.mark.parametrize("step", ["capture", "encode"])
def test_value_is_that_of_the_loss(step):
    module = wrapped(step, "ask")
    batch = next(iter(make_loader()))
    trainer = make_trainer(max_steps=1, callbacks=[make_refresh()])
    trainer.fit(module, make_loader())
    wanted = module.loss(
        module.model.encode_audio(batch), module.model.encode_text(batch), knowledge=module.loss.knowledge
    )
    found = module.training_step(batch, 0)
    assert torch.equal(found["loss"] if isinstance(found, dict) else found, wanted)


def test_same_weights_with_the_interaction_itself():
    weights = []
    for given in ("name", "module"):
        torch.manual_seed(0)
        model = WithStep()
        interaction = "interaction" if given == "name" else model.interaction
        module = ASKModule(model, ReliabilityOTLoss(4, interaction=interaction))
        assert [name for name, _ in module.named_parameters()] == [
            name for name, _ in model.named_parameters()
        ]
        make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_checkpoint_restores_the_loss_by_the_name(tmp_path):
    module = wrapped("capture", "ask")
    trainer = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    plain = WithStep()
    plain.load_state_dict(torch.load(tmp_path / "a.ckpt")["state_dict"])
    again = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", WithStep())
    assert again.loss.interaction == "interaction"
    assert torch.equal(again.model.interaction.prototypes, plain.interaction.prototypes)
    batch = next(iter(make_loader()))
    sides = [again.model.encode_audio(batch), again.model.encode_text(batch)]
    value = again.loss(*sides, knowledge=module.loss.knowledge)
    assert torch.equal(value, module.loss(*sides, knowledge=module.loss.knowledge))


def test_interaction_that_is_not_the_models():
    with pytest.raises(ValueError, match=r"parameters that are not the model's \(interaction.prototypes"):
        ASKModule(WithStep(), NTXentLoss(interaction=PrototypeAttention(WIDTH)))


def test_missing_interaction():
    with pytest.raises(ValueError, match="`interaction` has to name an attribute of WithStep, but"):
        ASKModule(WithStep(), NTXentLoss(interaction="other"))


def test_loss_that_takes_no_tokens():
    module = ASKModule(WithStep(), TripletLoss())
    with pytest.raises(TypeError, match="TripletLoss compares pooled embeddings, but the encoders returned"):
        make_trainer(max_epochs=1).fit(module, make_loader())


def test_single_pair_has_a_gradient_for_each_parameter():
    module = wrapped("encode", "contrast")
    trainer = make_trainer(max_epochs=1)
    with pytest.warns(UserWarning, match="A batch holds a single pair"):
        trainer.fit(module, DataLoader(Subset(Pairs(), [0]), batch_size=1))
    value = module.training_step(next(iter(DataLoader(Pairs(), batch_size=1))), 0)
    assert value == 0
    value.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in module.parameters())


def test_pair_encoders_are_pooled():
    module, batch = wrapped("encode", "contrast"), next(iter(make_loader()))
    for target in (module, module.model):
        audio, text = find_pair_encoder(target)(batch)
        assert audio.shape == text.shape == (8, WIDTH)
    assert module.embed_pairs(batch)[0].shape == (8, WIDTH)
