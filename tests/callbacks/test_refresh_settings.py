"""What is checked before and while a source is encoded, and what a resumed run says of changed settings."""

import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from ask_lightning import ASKModule, InfluenceMonitor, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.utilities import faiss_import
from tests.helpers.clients import PlainTowers, SelfContained, make_loader, make_refresh, make_trainer


def wrap(model=None, **options):
    return ASKModule(model or PlainTowers(), ReliabilityOTLoss(num_neighbors=3, **options))


def test_encoders_that_squeeze_a_last_batch_of_one():
    class Squeezing(PlainTowers):
        def encode_audio(self, batch):
            return super().encode_audio(batch).squeeze()

    with pytest.raises(ValueError, match=r"audio \(8,\) and text \(1, 8\).*do not squeeze"):
        make_trainer(callbacks=[KnowledgeRefreshCallback(num_prototypes=4)]).fit(
            wrap(Squeezing()), make_loader(41)
        )


def test_faiss_is_asked_for_before_anything_is_encoded(monkeypatch):
    def absent():
        raise ImportError("Faiss cannot be loaded")

    monkeypatch.setattr("ask_lightning.callbacks.refresh.import_faiss", absent)
    callback = KnowledgeRefreshCallback(index="HNSW32", num_prototypes=4)
    monkeypatch.setattr(callback, "refresh", lambda *args: pytest.fail("too late"))
    with pytest.raises(ImportError, match="Faiss cannot be loaded"):
        make_trainer(callbacks=[callback]).fit(wrap(), make_loader())
    assert faiss_import.faiss_is_available()


def test_changed_settings_are_said_at_a_resume(tmp_path):
    def run(epochs, checkpoint=None, **settings):
        keep = ModelCheckpoint(tmp_path, save_last=True)
        callbacks = [KnowledgeRefreshCallback(T=4, **settings), keep]
        fit = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True)
        fit.fit(wrap(), make_loader(), ckpt_path=checkpoint)

    run(1, num_prototypes=4)
    with pytest.warns(UserWarning, match="built with other settings: num_prototypes 4 → 6"):
        run(2, tmp_path / "last.ckpt", num_prototypes=6)


def test_no_drift_of_a_source_without_fixed_rows():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([make_loader().dataset[row] for row in torch.randperm(48).tolist()])

    fit = make_trainer(
        max_epochs=2,
        callbacks=[KnowledgeRefreshCallback(T=1, source=DataLoader(Stream(), 8), num_prototypes=4)],
    )
    fit.fit(wrap(), make_loader())
    assert "ask/refresh_seconds" in fit.callback_metrics
    assert "ask/rdm_audio" not in fit.callback_metrics


def test_influence_is_measured_once_an_optimiser_step(monkeypatch):
    measured = []
    monkeypatch.setattr(
        "ask_lightning.callbacks.monitors.influence_of_knowledge",
        lambda *args, **named: measured.append(1) or {"fine": torch.tensor(1.0)},
    )
    fit = make_trainer(
        max_epochs=1,
        accumulate_grad_batches=3,
        callbacks=[KnowledgeRefreshCallback(T=4, num_prototypes=4), InfluenceMonitor(1)],
    )
    fit.fit(wrap(), make_loader())
    assert len(measured) == fit.global_step == 2


def test_a_subclass_and_numpy_numbers_make_a_checkpoint_that_loads_safely(tmp_path):
    class Mine(ReliabilityOTLoss):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)

    loss = Mine(num_neighbors=3, temperature=np.geomspace(0.05, 0.1, 3)[1], lambda_fine=np.float64(0.1))
    fit = make_trainer(max_epochs=1, callbacks=[KnowledgeRefreshCallback(T=4, num_prototypes=4)])
    fit.fit(ASKModule(PlainTowers(), loss), make_loader())
    fit.save_checkpoint(tmp_path / "numpy.ckpt")
    stored = torch.load(tmp_path / "numpy.ckpt", weights_only=True)["ask_lightning"]["loss"]
    assert stored["lambda_fine"] == 0.1
    assert stored["temperature"] == pytest.approx(0.0707, abs=1e-4)


@pytest.mark.parametrize("temperature", ["0.07", None, torch.ones(3)])
def test_temperature_of_another_kind(temperature):
    with pytest.raises(TypeError, match="`temperature` has to be a number, the name of an attribute"):
        ReliabilityOTLoss(temperature=temperature)


def test_temperature_tensor_that_is_not_positive():
    with pytest.raises(ValueError, match=r"`temperature` has to be positive, but got -1\.0"):
        ReliabilityOTLoss(temperature=torch.tensor(-1.0))


@pytest.mark.parametrize("temperature", [lambda model: model.tau, "tau"])
def test_temperature_of_a_module_without_the_wrapper(temperature):
    class Client(SelfContained):
        tau = 0.5

    model = Client(temperature=temperature)
    with pytest.raises(RuntimeError, match=r"reads its temperature from a model and has none"):
        _ = model.objective.temperature
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(model, make_loader())
    assert model.objective.temperature == 0.5


def test_a_callback_that_has_trained_can_be_sent_to_another_process():
    callback = make_refresh(2)
    make_trainer(max_epochs=1, callbacks=[callback]).fit(wrap(PlainTowers()), make_loader())
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.target.loss.knowledge.fingerprint == callback.target.loss.knowledge.fingerprint
    make_trainer(max_epochs=1, callbacks=[copy]).fit(wrap(PlainTowers()), make_loader())
