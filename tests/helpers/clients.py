"""Retrieval models written the way people write them, none of them with ASK in mind."""

import math
import random

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from ask_lightning import ASKModule, KnowledgeBase, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.functional import nt_xent
from ask_lightning.losses import RetrievalLoss

WIDTH, AUDIO, TEXT = 8, 12, 10
# ASK without ASK: every switch off, one granularity.
NEUTRAL = {
    "injection_ratio": 0.0,
    "ot_factor": 0.0,
    "lambda_fine": 0.0,
    "lambda_coarse": 0.0,
    "granularities": ("fine",),
}


class Pairs(Dataset):
    """Random but learnable pairs: audio and text are noisy views of one latent vector."""

    def __init__(self, size: int = 48, seed: int = 0, captions_per_clip: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(size, 6, generator=generator)
        self.audio = latent @ torch.randn(6, AUDIO, generator=generator)
        self.text = latent @ torch.randn(6, TEXT, generator=generator)
        self.audio += 0.3 * torch.randn(size, AUDIO, generator=generator)
        self.text += 0.3 * torch.randn(size, TEXT, generator=generator)
        self.clip_id = torch.arange(size) // captions_per_clip

    def __len__(self) -> int:
        return len(self.audio)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"audio": self.audio[row], "text": self.text[row], "clip_id": self.clip_id[row]}


class EpochSeededSampler(torch.utils.data.Sampler):
    """A shuffle that depends on the epoch only; Lightning calls `set_epoch`."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def make_loader(size: int = 48, batch_size: int = 8, **settings) -> DataLoader:
    pairs = Pairs(size, **settings)
    return DataLoader(pairs, batch_size, sampler=EpochSeededSampler(size), drop_last=True)


def held_out() -> DataLoader:
    """Two batches of other pairs, always the same."""
    return DataLoader(Pairs(16, seed=1), 8)


class Towers(pl.LightningModule):
    """Two linear encoders; the base of the clients below."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.audio_encoder = nn.Linear(AUDIO, WIDTH)
        self.text_encoder = nn.Linear(TEXT, WIDTH)

    def encode_audio(self, batch) -> Tensor:
        return self.audio_encoder(batch["audio"])

    def encode_text(self, batch) -> Tensor:
        return self.text_encoder(batch["text"])

    def contrast(self, audio: Tensor, text: Tensor) -> Tensor:
        scores = F.normalize(text, dim=1) @ F.normalize(audio, dim=1).T
        return 0.5 * (nt_xent(scores) + nt_xent(scores.T))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


class PlainTowers(Towers):
    """Plain NT-Xent."""

    def training_step(self, batch, batch_idx):
        return self.contrast(self.encode_audio(batch), self.encode_text(batch))


class InlineClient(Towers):
    """(a) Sets its learning rate inside the step, has a learnable temperature and an inline InfoNCE."""

    def __init__(self, learning_rate: float = 1e-2, warmup: int = 10) -> None:
        super().__init__(learning_rate)
        self.save_hyperparameters()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.seen_rates: list[float] = []

    def lr_scheduler_step(self, batch_idx):
        """A schedule of its own under the name of a Lightning hook with other arguments."""
        rate = self.hparams.learning_rate * min(1.0, (self.global_step + 1) / self.hparams.warmup)
        for group in self.optimizers().param_groups:
            group["lr"] = rate
        self.seen_rates.append(rate)

    def training_step(self, batch, batch_idx):
        self.lr_scheduler_step(batch_idx)
        audio = F.normalize(self.encode_audio(batch), dim=-1)
        text = F.normalize(self.encode_text(batch), dim=-1)
        logits = self.logit_scale.exp() * audio @ text.T
        labels = torch.arange(len(logits), device=self.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        self.log("train/loss", loss)
        return {"loss": loss, "scale": self.logit_scale.detach()}

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    def predict_step(self, batch, batch_idx):
        return self.encode_audio(batch)


class CriterionClient(Towers):
    """(b) Calls `self.loss_fn(audio, text)` and adds an auxiliary loss."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.loss_fn = ContrastiveLoss()

    def training_step(self, batch, batch_idx):
        audio, text = self.encode_audio(batch), self.encode_text(batch)
        auxiliary = 1e-2 * (audio.norm(dim=1) - 1).square().mean()
        self.log("train/auxiliary", auxiliary)
        return self.loss_fn(audio, text) + auxiliary


class ContrastiveLoss(nn.Module):
    def forward(self, audio: Tensor, text: Tensor) -> Tensor:
        scores = F.normalize(text, dim=1) @ F.normalize(audio, dim=1).T
        return 0.5 * (nt_xent(scores) + nt_xent(scores.T))


class FrozenClient(PlainTowers):
    """(d) Frozen batch norm, dropout, an EMA copy, two parameter groups, a schedule."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.norm = nn.BatchNorm1d(AUDIO)
        self.norm.requires_grad_(False)
        self.dropout = nn.Dropout(0.2)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.audio_encoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

    def on_train_epoch_start(self) -> None:
        self.norm.eval()

    def encode_audio(self, batch) -> Tensor:
        return self.audio_encoder(self.dropout(self.norm(batch["audio"])))

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.average.update_parameters(self.audio_encoder)

    def configure_optimizers(self):
        groups = [
            {"params": self.audio_encoder.parameters(), "lr": 1e-2},
            {"params": self.text_encoder.parameters(), "lr": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class RestlessTowers(PlainTowers):
    """Dropout, batch norm, three random streams in its step, logs and a torchmetrics metric."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.norm = nn.BatchNorm1d(AUDIO)
        self.dropout = nn.Dropout(0.3)
        self.mean_loss = MeanMetric()

    def encode_audio(self, batch) -> Tensor:
        return self.audio_encoder(self.dropout(self.norm(batch["audio"])))

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.random() + float(torch.rand(()))  # noqa: NPY002
        loss = super().training_step(batch, batch_idx)
        self.mean_loss.update(loss.detach())
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/noise", noise)
        self.log("train/mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))


class SelfContained(Towers):
    """No wrapper: calls a ReliabilityOTLoss of its own, also when it validates."""

    def __init__(self, learning_rate: float = 1e-2, **options) -> None:
        super().__init__(learning_rate)
        self.objective = ReliabilityOTLoss(**({"num_neighbors": 4} | options))

    def training_step(self, batch, batch_idx):
        return self.objective(self.encode_audio(batch), self.encode_text(batch))

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.objective(self.encode_audio(batch), self.encode_text(batch)))


def wrap(model: pl.LightningModule, settings: dict | None = None, **options) -> ASKModule:
    """The model under ASK with so few neighbours that a small source has them."""
    return ASKModule(model, ReliabilityOTLoss(**({"num_neighbors": 4} | (settings or {}))), **options)


def make_refresh(T: int = 15, source=None, **settings) -> KnowledgeRefreshCallback:
    """The callback with so few prototypes that a small source has them."""
    return KnowledgeRefreshCallback(T, source, **({"num_prototypes": 6} | settings))


def static_knowledge(model: Towers, size: int = 48) -> KnowledgeBase:
    """A base by the model's present encoders, built by hand."""
    pairs = Pairs(size)
    with torch.no_grad():
        audio, text = model.audio_encoder(pairs.audio), model.text_encoder(pairs.text)
    return KnowledgeBase.from_embeddings(audio, text, num_prototypes=6)


class Watcher(pl.Callback):
    """Notes what happens in each training step and at the end of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self.clips: list[list[int]] = []
        self.knowledge: list[str | None] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.clips.append(batch["clip_id"].tolist())
        loss = next((part for part in pl_module.modules() if isinstance(part, RetrievalLoss)), None)
        base = loss.knowledge if loss is not None else None
        self.knowledge.append(base.fingerprint if base is not None else None)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.metrics.append(own_metrics(trainer.callback_metrics))


class MemoryLogger(Logger):
    """Keeps every logged row, without the step counter's epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.hyperparameters: dict = {}

    name, version = "memory", 0

    def log_metrics(self, metrics, step) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params) -> None:
        self.hyperparameters = dict(params)

    @property
    def own_rows(self) -> list[tuple[int, dict[str, float]]]:
        """The model's rows: without what ASK logs."""
        rows = [(step, own_metrics(row)) for step, row in self.rows]
        return [(step, row) for step, row in rows if set(row) - {"epoch"}]

    def values(self, name: str) -> list[float]:
        """All values of one metric."""
        return [row[name] for _, row in self.rows if name in row]

    @property
    def names(self) -> set[str]:
        return {name for _, row in self.rows for name in row}


def own_metrics(metrics) -> dict[str, float]:
    """The model's metrics: without what ASK logs."""
    return {name: float(value) for name, value in metrics.items() if not name.startswith("ask/")}


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Bit for bit, buffers too."""
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    off = [name for name in one if not torch.equal(one[name], other[name])]
    assert not off, f"{off} differ"


def make_trainer(**settings) -> pl.Trainer:
    """A quiet trainer on one CPU process."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
    }
    return pl.Trainer(**(defaults | settings))
