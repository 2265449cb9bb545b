"""(c) A LightningModule around `transformers.ClapModel`, whose encoders return output objects."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from tests.helpers.clients import MemoryLogger, Watcher, make_refresh, make_trainer, wrap

transformers = pytest.importorskip("transformers")

WORDS, FRAMES, MELS = 99, 64, 16


def tiny_clap() -> torch.nn.Module:
    text = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 40,
        "projection_dim": 8,
    }
    audio = {
        "window_size": 4,
        "num_mel_bins": MELS,
        "spec_size": 64,
        "patch_size": 2,
        "patch_stride": [2, 2],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "projection_dim": 8,
        "enable_fusion": False,
    }
    return transformers.ClapModel(
        transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)
    )


class Clap(pl.LightningModule):
    """Returns what `transformers` returns, not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_clap()

    def encode_audio(self, batch):
        return self.model.get_audio_features(input_features=batch["mel"])

    def encode_text(self, batch):
        return self.model.get_text_features(
            input_ids=batch["words"], attention_mask=torch.ones_like(batch["words"])
        )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def pooled(output):
    return getattr(output, "pooler_output", output)


class TrainingClap(Clap):
    """With a step of its own: the loss of `ClapModel`, with its learnable scales."""

    def training_step(self, batch, batch_idx):
        audio = F.normalize(pooled(self.encode_audio(batch)), dim=-1)
        text = F.normalize(pooled(self.encode_text(batch)), dim=-1)
        scores = self.model.logit_scale_a.exp() * text @ audio.T
        loss = F.cross_entropy(scores, torch.arange(len(scores)))
        self.log("train/clap_loss", loss)
        return loss


class Recordings(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        mel = torch.randn(1, FRAMES, MELS, generator=generator)
        words = torch.randint(5, WORDS, (7,), generator=generator)
        return {"mel": mel, "words": words, "clip_id": row}


@pytest.mark.parametrize(("model", "step"), [(Clap, "encode"), (TrainingClap, "capture")])
def test_clap_trains(model, step, tmp_path):
    pl.seed_everything(0, verbose=False)
    model = model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = wrap(model, {"num_neighbors": 3})
    assert module.ask_step == step
    watcher, logger = Watcher(), MemoryLogger()
    data = DataLoader(Recordings(), 4, shuffle=True)
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(1), watcher], logger=logger, log_every_n_steps=1)
    run.fit(module, data)
    assert len(watcher.losses) == 6
    assert module.loss.knowledge.fine.audio.shape == (12, 8)
    assert module.loss.knowledge.fine.audio.norm(dim=1).allclose(torch.ones(12))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("model.audio_model.") for name in moved)
    assert any(name.startswith("model.text_model.") for name in moved)
    assert ("train/clap_loss" in logger.names) == (step == "capture")

    run.save_checkpoint(tmp_path / "clap.ckpt")
    alone = type(model).load_from_checkpoint(tmp_path / "clap.ckpt", map_location="cpu")
    for name, value in alone.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_encoder_that_returns_no_embeddings():
    class Tokens(Clap):
        def encode_text(self, batch):
            return {"tokens": batch["words"]}

    data = DataLoader(Recordings(), 4)
    with pytest.raises(TypeError, match=r"`encode_text` has to return a tensor .* but got a dict"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Tokens()), data)
