"""A test on two ranks has the metrics of one process, although a sampler repeats rows for it."""

import lightning as L
import pytest

from ask_lightning.data import DatasetsDataModule, Soundscapes
from ask_lightning.models import TinyRetriever
from tests.helpers.ranks import on_ranks


def metrics_of(stage: str, interaction: str | None, devices: int) -> dict[str, float]:
    L.seed_everything(0, verbose=False)
    model = TinyRetriever(width=8, interaction=interaction)
    # 15 pairs: the second rank gets one of them that the first one has as well.
    scenes = Soundscapes(5, seconds=0.5, captions_per_clip=3)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = DatasetsDataModule(train=scenes, val=scenes, test=scenes, batch_size=3)
    (metrics,) = getattr(trainer, stage)(model, datamodule=data, verbose=False)
    return dict(metrics)


@pytest.mark.filterwarnings("ignore:.*recommended to use .*devices=1")
@pytest.mark.parametrize(
    ("stage", "interaction"), [("validate", None), ("test", None), ("test", "prototypes")]
)
def test_rows_that_a_sampler_repeats_count_once(stage, interaction):
    expected = metrics_of(stage, interaction, 1)
    for metrics in on_ranks(2, metrics_of, stage, interaction, 2, grouped=False):
        assert metrics == expected
