"""Every loss of the library trains in an `ASKModule`, and comes back from its checkpoint."""

import inspect

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ask_lightning.losses
from ask_lightning import ASKModule, KnowledgeRefreshCallback, NTXentLoss, SigmoidLoss
from ask_lightning.losses import RetrievalLoss
from tests.helpers.clients import PlainTowers, make_loader, make_trainer

LOSSES = [
    kind
    for name in ask_lightning.losses.__all__
    if not inspect.isabstract(kind := getattr(ask_lightning.losses, name))
]
WITHOUT_KNOWLEDGE = [kind for kind in LOSSES if not kind.needs_knowledge]


class Towers(L.LightningModule):
    """Two linear encoders, with a temperature and a bias of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.text = nn.Linear(5, 4), nn.Linear(5, 4)
        self.temperature, self.bias = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-2.0))

    def encode_audio(self, batch):
        return self.audio(batch["audio"])

    def encode_text(self, batch):
        return self.text(batch["text"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> DataLoader:
    audio, text = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    rows = [{"audio": audio[i], "text": text[i], "clip": i // 2} for i in range(16)]
    return DataLoader(rows, batch_size=8)


def fitted(loss: RetrievalLoss, model: L.LightningModule | None = None) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ASKModule(model or Towers(), loss, ids="clip"), batches())
    return trainer


@pytest.mark.parametrize("kind", LOSSES)
def test_a_checkpoint_restores_the_loss(kind, tmp_path):
    loss = kind(positives="ids")
    wrapped = ASKModule(Towers(), loss, ids="clip")
    checkpoint = {"state_dict": wrapped.state_dict()}
    wrapped.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    restored = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", Towers(), ids="clip")
    assert type(restored.loss) is kind
    assert restored.loss.options == loss.options
    assert restored.loss.options["positives"] == "ids"


@pytest.mark.parametrize("kind", WITHOUT_KNOWLEDGE)
def test_it_trains_without_a_refresh_and_its_terms_are_logged(kind):
    model = Towers()
    before = model.audio.weight.clone()
    trainer = fitted(kind(), model)
    assert not torch.equal(model.audio.weight, before)
    terms = {name for name in trainer.logged_metrics if name.startswith("ask/")}
    assert "ask/loss" in terms
    assert len(terms) >= 2
    assert all(torch.isfinite(trainer.logged_metrics[name]) for name in terms)


def test_temperature_and_bias_of_the_model_are_learned():
    model = Towers()
    fitted(SigmoidLoss(model.temperature, model.bias), model)
    assert model.temperature != 0.2
    assert model.bias != -2


def test_a_bias_that_is_not_the_models_is_refused():
    with pytest.raises(ValueError, match=r"has parameters that are not the model's \(bias\)"):
        ASKModule(Towers(), SigmoidLoss(bias=nn.Parameter(torch.tensor(-10.0))))


def test_ids_are_asked_for_when_it_is_made():
    with pytest.raises(ValueError, match="`ids` has to be given, because NTXentLoss with these options"):
        ASKModule(Towers(), NTXentLoss(positives="same_clip"))


def test_a_loss_that_two_wrappers_share_reads_the_model_that_trains():
    """As where the loss is made once for all folds of a cross-validation."""

    class Client(PlainTowers):
        def __init__(self, temperature):
            super().__init__()
            self.tau = nn.Parameter(torch.tensor(temperature))

    loss = NTXentLoss("tau")
    first, second = (ASKModule(Client(temperature), loss) for temperature in (0.1, 0.5))
    make_trainer(max_epochs=1).fit(first, make_loader())
    assert first.model.tau != 0.1
    make_trainer(max_epochs=1).fit(second, make_loader())
    assert second.model.tau != 0.5


def test_numbers_of_a_loss_follow_a_schedule():
    class Schedule(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.loss.temperature, pl_module.loss.bias = 0.5, -3.0

    def trained(loss, *callbacks):
        torch.manual_seed(0)
        model = PlainTowers()
        make_trainer(max_epochs=1, callbacks=list(callbacks)).fit(ASKModule(model, loss), make_loader())
        return model.state_dict()

    scheduled, told = trained(SigmoidLoss(0.1, -10.0), Schedule()), trained(SigmoidLoss(0.5, -3.0))
    assert all(torch.equal(scheduled[name], value) for name, value in told.items())


def test_a_number_is_not_set_where_the_model_has_it():
    loss = SigmoidLoss("temperature", 0.0)
    with pytest.raises(AttributeError, match=r"temperature of SigmoidLoss is that of the model.*=0\.2\)"):
        loss.temperature = 0.2
    loss = NTXentLoss(0.1)
    with pytest.raises(ValueError, match="`temperature` has to be positive, but got 0"):
        loss.temperature = 0
    assert loss.temperature == 0.1


def test_a_refresh_that_the_loss_does_not_use_is_reported():
    trainer = make_trainer(max_epochs=1, callbacks=[KnowledgeRefreshCallback(num_prototypes=2)])
    with pytest.warns(UserWarning, match="NTXentLoss needs no knowledge, so .* Leave it out"):
        trainer.fit(ASKModule(PlainTowers(), NTXentLoss()), make_loader(48))


@pytest.mark.parametrize("criterion", [None, "loss_fn"])
def test_a_model_with_such_a_loss_of_its_own(criterion):
    """Knowledge goes to the wrapper's loss."""

    class Own(PlainTowers):
        def __init__(self) -> None:
            super().__init__()
            self.loss_fn = NTXentLoss()

        def training_step(self, batch, batch_idx):
            return self.loss_fn(self.encode_audio(batch), self.encode_text(batch))

    module = ASKModule(Own(), ask_lightning.losses.ReliabilityOTLoss(num_neighbors=4), criterion=criterion)
    run = make_trainer(max_epochs=1, callbacks=[KnowledgeRefreshCallback(1, num_prototypes=4)])
    run.fit(module, make_loader())
    assert len(module.loss.knowledge.fine) == 48
    assert module.model.loss_fn.knowledge is None
