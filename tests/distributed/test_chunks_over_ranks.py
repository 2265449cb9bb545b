"""Batches in chunks on two ranks: each gradient is averaged once, and is that of whole batches."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from ask_lightning import ASKModule, NTXentLoss
from tests.helpers.clients import AUDIO, WIDTH, Pairs, PlainTowers, make_trainer
from tests.helpers.ranks import on_ranks

STEPS, BATCH = 3, 10


class Uneven(PlainTowers):
    """With a part that only the batches of rank 0 use, and one that nobody uses."""

    def __init__(self, has_rare_parts: bool) -> None:
        super().__init__(0.1)
        self.temperature = nn.Parameter(torch.tensor(0.2))
        if has_rare_parts:
            self.rare, self.idle = nn.Linear(AUDIO, WIDTH), nn.Linear(2, 2)

    def encode_audio(self, batch):
        encoded = super().encode_audio(batch)
        if hasattr(self, "rare") and self.global_rank == 0:
            encoded = encoded + self.rare(batch["audio"])
        return encoded

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


def fit(options: dict, *, ranks: int, gather: bool, accumulate: int = 1, **strategy) -> dict:
    """Losses and weights on one rank."""
    pl.seed_everything(1, verbose=False)
    model = Uneven(strategy.get("find_unused_parameters", False)).double()
    module = ASKModule(model, NTXentLoss("temperature", gather=gather), **options)
    losses = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            rows, pairs = torch.arange(STEPS * BATCH), Pairs(STEPS * BATCH)
            mine = [part for batch in rows.split(BATCH) for part in _share(batch, self.trainer, ranks)]
            return DataLoader(torch.utils.data.Subset(pairs, mine), BATCH // ranks)

    run = make_trainer(
        max_epochs=2,
        devices=ranks,
        accumulate_grad_batches=accumulate,
        precision="64-true",
        callbacks=[Watch()],
        use_distributed_sampler=False,
        **({"strategy": DDPStrategy(**strategy)} if ranks > 1 else {}),
    )
    run.fit(module, datamodule=Data())
    return {"losses": losses, "weights": model.state_dict()}


def _share(batch, trainer, ranks: int) -> list[int]:
    return batch.tensor_split(ranks)[trainer.global_rank].tolist()


@pytest.mark.parametrize("step", ["capture", "encode"])
@pytest.mark.parametrize("gather", [True, False])
def test_two_ranks(gather, step):
    chunked, whole = (
        on_ranks(2, fit, {"step": step} | options, grouped=False, ranks=2, gather=gather)
        for options in ({"chunk_size": 2}, {})
    )
    for one, other in zip(chunked, whole, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-10)
        for name, weight in other["weights"].items():
            torch.testing.assert_close(one["weights"][name], weight, rtol=1e-10, atol=1e-10)
            assert torch.equal(one["weights"][name], chunked[0]["weights"][name])
    if gather:
        alone = fit({"step": step}, ranks=1, gather=True)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(chunked[0]["weights"][name], weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param({"find_unused_parameters": True}, marks=pytest.mark.slow),
        {"find_unused_parameters": True, "gradient_as_bucket_view": True, "accumulate": 2},
        {"static_graph": True},
        pytest.param({"bucket_cap_mb": 0.0001, "accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_settings_of_ddp(strategy):
    """A parameter that only one rank uses has a gradient; one that nobody uses is left as it was."""
    chunked, whole = (
        on_ranks(2, fit, {"step": "encode"} | options, grouped=False, ranks=2, gather=True, **strategy)
        for options in ({"chunk_size": 2}, {})
    )
    for one, other in zip(chunked, whole, strict=True):
        for name, weight in other["weights"].items():
            torch.testing.assert_close(one["weights"][name], weight, rtol=1e-10, atol=1e-10)
