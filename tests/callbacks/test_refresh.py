"""When knowledge is refreshed, what is logged, and what happens when it fails."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.helpers.clients import (
    MemoryLogger,
    Pairs,
    PlainTowers,
    SelfContained,
    Watcher,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.spied_refresh import Spied


@pytest.mark.parametrize(("T", "epochs"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_refresh_whenever_the_epoch_is_divisible(T, epochs):
    spied = Spied(T)
    run = make_trainer(max_epochs=5, limit_train_batches=2, callbacks=[spied])
    run.fit(wrap(PlainTowers()), make_loader())
    assert [epoch for epoch, _ in spied.refreshed_at] == epochs


def test_refreshed_before_the_first_step_of_the_epoch_with_its_encoders():
    """The base of epoch e is made by the weights with which epoch e begins."""
    moments = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                base = pl_module.loss.knowledge
                with torch.no_grad():
                    now = pl_module.model.audio_encoder(Pairs(48).audio)
                moments.append(base.fine.audio.allclose(nn.functional.normalize(now, dim=1), atol=1e-6))

    make_trainer(max_epochs=4, callbacks=[make_refresh(2), Look()]).fit(wrap(PlainTowers()), make_loader())
    assert moments == [True, False, True, False]


NAMES = {"ask/loss", "ask/knowledge_age", "ask/refresh_seconds", "ask/pairs_per_second"}


def test_names_of_the_logs():
    logger = MemoryLogger()
    run = make_trainer(max_epochs=5, callbacks=[make_refresh(2)], logger=logger, log_every_n_steps=1)
    run.fit(wrap(PlainTowers()), make_loader())
    per_granularity = {
        f"ask/{term}_{name}" for term in ("plan_entropy", "plan_diagonal") for name in ("fine", "coarse")
    }
    per_direction = {
        f"ask/{term}_{way}"
        for term in ("contrastive", "factor", "psi_fine", "psi_coarse", "factor_fine", "factor_coarse")
        for way in ("t2a", "a2t")
    }
    drift = {f"ask/{term}_{side}" for term in ("rdm", "mean_similarity") for side in ("audio", "text")}
    assert logger.names == NAMES | per_granularity | per_direction | drift | {"epoch"}
    assert logger.values("ask/knowledge_age") == [0, 1, 0, 1, 0]
    assert len(logger.values("ask/loss")) == 30
    assert len(logger.values("ask/refresh_seconds")) == 3
    assert len(logger.values("ask/rdm_audio")) == 2, "there is nothing to drift from at first"
    assert all(value > 0 for value in logger.values("ask/rdm_audio") + logger.values("ask/pairs_per_second"))


def test_drift_at_a_refresh_of_encoders_that_stand_still():
    class Still(PlainTowers):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    logger = MemoryLogger()
    run = make_trainer(callbacks=[make_refresh(1)], logger=logger)
    run.fit(wrap(Still()), make_loader())
    assert logger.values("ask/rdm_audio") == logger.values("ask/rdm_text") == [0, 0]


def test_no_drift_between_sources_of_different_size():
    class Client(PlainTowers):
        def train_dataloader(self):
            return make_loader(16 * (1 + self.trainer.current_epoch))

    logger = MemoryLogger()
    run = make_trainer(reload_dataloaders_every_n_epochs=1, callbacks=[make_refresh(1)], logger=logger)
    run.fit(wrap(Client()))
    assert not logger.values("ask/rdm_audio")


def test_nan_at_a_later_refresh_keeps_the_base_in_use_and_on_disk(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ask_lightning import KnowledgeBase

    class Breaking(PlainTowers):
        def on_train_epoch_end(self):
            if self.trainer.current_epoch == 1:
                with torch.no_grad():
                    self.text_encoder.weight[0, 0] = torch.nan

    module, watcher = wrap(Breaking()), Watcher()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = make_trainer(max_epochs=5, callbacks=[make_refresh(2), watcher, keep], enable_checkpointing=True)
    with pytest.raises(
        ValueError, match=r"text embeddings of 48 of 48 source rows contain NaN or Inf \(rows 0"
    ):
        run.fit(module, make_loader())
    assert len(watcher.losses) == 12
    assert module.loss.knowledge.fingerprint == watcher.knowledge[-1]
    (snapshot,) = tmp_path.glob("*.safetensors")
    assert KnowledgeBase.load(snapshot).fingerprint == watcher.knowledge[-1]


def test_sanity_validation_before_the_first_base():
    """A module that calls the loss in its validation step, too."""
    logger, model = MemoryLogger(), SelfContained()
    run = make_trainer(max_epochs=2, callbacks=[make_refresh()], num_sanity_val_steps=1, logger=logger)
    with pytest.warns(UserWarning, match="evaluates without knowledge, as plain NT-Xent"):
        run.fit(model, make_loader(), held_out())
    assert len(logger.values("val/loss")) == 2
    assert model.objective.knowledge is not None


def test_validation_terms_are_not_logged_as_training_terms():
    logger, model = MemoryLogger(), SelfContained()
    watcher = Watcher()
    run = make_trainer(
        max_epochs=2,
        callbacks=[make_refresh(), watcher],
        val_check_interval=2,
        logger=logger,
        log_every_n_steps=1,
    )
    run.fit(model, make_loader(), held_out())
    assert logger.values("ask/loss") == watcher.losses


def test_module_without_the_wrapper():
    class Client(SelfContained):
        def encode_ids(self, batch):
            return batch["clip_id"]

        def training_step(self, batch, batch_idx):
            audio, text = self.encode_audio(batch), self.encode_text(batch)
            return self.objective(audio, text, ids=self.encode_ids(batch))

    pl.seed_everything(0, verbose=False)
    model, watcher = Client(exclude_self=True), Watcher()
    run = make_trainer(max_epochs=6, callbacks=[make_refresh(2), watcher])
    run.fit(model, make_loader(captions_per_clip=2))
    assert len(set(watcher.knowledge)) == 3
    assert model.objective.knowledge.ids.tolist() == [row // 2 for row in range(48)]
    assert sum(watcher.losses[-6:]) < sum(watcher.losses[:6])


def test_module_without_the_wrapper_with_one_method_for_all():
    class Client(SelfContained):
        def embed_pairs(self, batch):
            return self.audio_encoder(batch["audio"]), self.text_encoder(batch["text"]), batch["clip_id"] + 7

    model = Client()
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(model, make_loader())
    assert model.objective.knowledge.ids.tolist() == list(range(7, 55))


def test_a_new_run_with_the_same_objects_begins_anew():
    module, spied = wrap(PlainTowers()), Spied(5)
    for _ in range(2):
        make_trainer(max_epochs=1, callbacks=[spied]).fit(module, make_loader())
    assert spied.refreshed_at == [(0, 0), (0, 0)]


def test_a_run_that_is_prolonged_goes_on():
    module, spied = wrap(PlainTowers()), Spied(3)
    run = make_trainer(max_epochs=2, callbacks=[spied])
    run.fit(module, make_loader())
    run.fit_loop.max_epochs = 4
    run.fit(module, make_loader())
    assert spied.refreshed_at == [(0, 0), (3, 18)]


def test_target_is_known_from_fit_on():
    with pytest.raises(RuntimeError, match="from the start of `fit` on"):
        _ = make_refresh().target
