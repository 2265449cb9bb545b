"""`encode_source`: the way of a batch to the encoders, and the precision of what they return."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.helpers.clients import (
    Pairs,
    PlainTowers,
    SelfContained,
    Watcher,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)


def test_transfer_hooks_run_and_know_that_it_is_no_training():
    class Client(PlainTowers):
        moments = ()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch | {"before": True}

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            assert batch["before"]
            return super().transfer_batch_to_device(batch, device, dataloader_idx) | {"moved": str(device)}

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert batch["moved"] == "cpu"
            if self.trainer.training:
                batch = batch | {"audio": batch["audio"] + 100}
            return batch | {"augmented": self.trainer.training}

        def encode_audio(self, batch):
            self.moments = (*self.moments, (torch.is_grad_enabled(), batch["augmented"]))
            return super().encode_audio(batch)

    model = Client()
    module = wrap(model)
    with torch.no_grad():
        clean = nn.functional.normalize(model.audio_encoder(Pairs(48).audio), dim=1)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert set(model.moments) == {(True, True), (False, False)}
    assert module.loss.knowledge.fine.audio.allclose(clean, atol=1e-6)


def test_outputs_are_copied_before_the_model_uses_their_memory_again():
    class Client(PlainTowers):
        """Writes all outputs into the same memory, as CUDA graphs do."""

        def __init__(self):
            super().__init__()
            self.buffers_of_outputs = {}

        def reused(self, name, output):
            if self.training:
                return output
            buffer = self.buffers_of_outputs.setdefault(name, torch.empty_like(output))
            return buffer.copy_(output)

        def encode_audio(self, batch):
            return self.reused("audio", super().encode_audio(batch))

        def encode_text(self, batch):
            return self.reused("text", super().encode_text(batch))

    module = wrap(Client())
    run = make_trainer(max_epochs=1, limit_train_batches=1, callbacks=[make_refresh(source=Pairs(48))])
    run.fit(module, make_loader())
    for side in ("audio", "text"):
        assert len(getattr(module.loss.knowledge.fine, side).unique(dim=0)) == 48


def test_transfer_hooks_of_a_datamodule():
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return make_loader()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer is not None
            return batch | {"audio": batch["audio"] + (100 if self.trainer.training else 1)}

    model = PlainTowers()
    module = wrap(model)
    with torch.no_grad():
        shifted = nn.functional.normalize(model.audio_encoder(Pairs(48).audio + 1), dim=1)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, datamodule=Data())
    assert module.loss.knowledge.fine.audio.allclose(shifted, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("ask", [True, False])
def test_rows_are_float32_in_every_precision(precision, ask):
    dtypes = set()

    class Client(PlainTowers if ask else SelfContained):
        validation_step = pl.LightningModule.validation_step

        def encode_audio(self, batch):
            embeddings = super().encode_audio(batch)
            dtypes.add(embeddings.dtype)
            return embeddings

    model = Client()
    watcher = Watcher()
    run = make_trainer(max_epochs=2, precision=precision, callbacks=[make_refresh(1), watcher])
    run.fit(wrap(model) if ask else model, make_loader())
    base = run.callbacks[0].target.loss.knowledge
    assert base.fine.audio.dtype == base.coarse.text.dtype == torch.float32
    assert base.fine.audio.norm(dim=1).allclose(torch.ones(48), atol=1e-6)
    wanted = {"bf16": torch.bfloat16, "32-t": torch.float32, "64-t": torch.float64}[precision[:4]]
    assert dtypes == {wanted}
    assert all(loss == loss for loss in watcher.losses)
