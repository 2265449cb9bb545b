"""A batch in chunks has the loss, the gradient and the side effects of the batch as a whole."""

import inspect
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import ask_lightning.losses
from ask_lightning import ASKModule, KnowledgeBase, NTXentLoss, ReliabilityOTLoss
from ask_lightning.interaction import PrototypeAttention, TokenEmbeddings
from ask_lightning.losses import MomentumContrastLoss, SigmoidLoss
from tests.helpers.clients import AUDIO, TEXT, WIDTH, MemoryLogger, Pairs, Towers, make_trainer

BATCH, CHUNK = 12, 5  # three chunks of four
LOSSES = [
    kind
    for name in ask_lightning.losses.__all__
    if not inspect.isabstract(kind := getattr(ask_lightning.losses, name))
]


class Restless(Towers):
    """Draws random numbers from every stream, and counts in a buffer what it has seen."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.temperature, self.bias = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-2.0))
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.LayerNorm(WIDTH)
        self.own_stream = torch.Generator().manual_seed(3)
        self.register_buffer("seen", torch.zeros(()))

    def encode_audio(self, batch):
        self.seen += len(batch["audio"])
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.random()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            scale += 0.1 * float(torch.rand(()))
        noise = torch.rand(len(batch["audio"]), WIDTH, generator=self.own_stream)
        return self.norm(self.audio_encoder(self.dropout(batch["audio"]))) * scale + 0.1 * noise

    def encode_text(self, batch):
        return dropout(self.norm(self.text_encoder(batch["text"])), 0.2, self.training)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def in_parts(encode):
    """The reference: chunks whose graphs are all kept."""

    def encoded(model, batch):
        parts = [
            {key: value[rows] for key, value in batch.items()}
            for rows in torch.arange(len(batch["audio"])).tensor_split(3)
        ]
        return torch.cat([getattr(model, encode)(part) for part in parts])

    return encoded


REFERENCE = {"audio": in_parts("encode_audio"), "text": in_parts("encode_text"), "step": "encode"}


def pairs_loader() -> DataLoader:
    return DataLoader(Pairs(3 * BATCH), BATCH)


def make_loss(kind, **options):
    loss = kind(**options)
    if loss.needs_knowledge:
        stored = Pairs(40, seed=5)
        loss.knowledge = KnowledgeBase.from_embeddings(
            stored.audio[:, :WIDTH].double(),
            stored.text[:, :WIDTH].double(),
            ids=stored.clip_id,
            num_prototypes=6,
        )
    return loss


def trained(make_model, loss, options, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a run of three steps an epoch."""
    pl.seed_everything(1, verbose=False)
    model, losses = make_model(), []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    run = make_trainer(**({"max_epochs": 2, "callbacks": [Losses()], "precision": "64-true"} | settings))
    run.fit(ASKModule(model, loss, ids="clip_id", **options), pairs_loader())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_run(chunked, reference, tolerance=1e-10):
    assert chunked[0] == pytest.approx(reference[0], rel=tolerance, abs=tolerance)
    for name, value in reference[1].items():
        torch.testing.assert_close(chunked[1][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_trains_as_if_all_graphs_were_kept(kind):
    taken = inspect.signature(kind).parameters
    options = {name: name for name in ("temperature", "bias") if name in taken}
    options |= {"num_neighbors": 4} if "num_neighbors" in taken else {}
    chunked, reference = (
        trained(Restless, make_loss(kind, **options), settings)
        for settings in ({"step": "encode", "chunk_size": CHUNK}, REFERENCE)
    )
    assert_same_run(chunked, reference)
    assert chunked[1]["seen"] == 2 * 3 * BATCH


def test_the_gradient_is_that_of_the_whole_batch():
    for precision, tolerance in (("64-true", 1e-10), ("32-true", 1e-6)):
        chunked, whole = (
            trained(Towers, NTXentLoss(), {"step": "encode"} | options, precision=precision)
            for options in ({"chunk_size": CHUNK}, {})
        )
        assert_same_run(chunked, whole, tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "16-mixed"},
    ],
)
def test_options_of_the_trainer(settings):
    def fit(options):
        plugins = {}
        if settings.get("precision") == "16-mixed":  # with the name alone Lightning takes bfloat16 on a CPU
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "precision": None}
        return trained(Restless, NTXentLoss("temperature"), options, **(settings | plugins))

    tolerance = 1e-2 if "precision" in settings else 1e-10
    chunked = fit({"step": "encode", "chunk_size": CHUNK})
    assert_same_run(chunked, fit(REFERENCE), tolerance)
    assert not torch.equal(chunked[1]["audio_encoder.weight"], Restless().audio_encoder.weight)
