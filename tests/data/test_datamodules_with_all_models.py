"""Every model of the package trains and is evaluated on every data module of the package."""

import lightning as L
import pytest
import torch

from ask_lightning.data import (
    AudioFolder,
    AudioOptions,
    DatasetsDataModule,
    FolderData,
    SoundscapeData,
    Soundscapes,
    WavCaps,
)
from ask_lightning.models import TinyRetriever
from tests.helpers.published import audiocaps, clotho
from tests.helpers.retrievers import MODELS

RATE = 16000
SHORT = {"sample_rate": RATE, "seconds": 0.5, "batch_size": 4}


def own_folder(record):
    rows = ["filename,caption"]
    for index in range(10):
        path = record(f"{index}.wav", seconds=0.7, pitch=200 + 50 * index)
        rows.append(f"{index}.wav,tone number {index}")
    table = path.parent / "clips.csv"
    table.write_text("\n".join(rows))
    return path.parent, table


def soundscapes(**options):
    return SoundscapeData(8, 4, 4, eval_captions_per_clip=2, **SHORT, **options)


def given_datasets(written, record):
    audio = AudioOptions(sample_rate=RATE, seconds=0.5)
    folder = AudioFolder(*own_folder(record), sample_rate=RATE, seconds=0.5)
    test = Soundscapes(4, sample_rate=RATE, seconds=0.5)
    train = WavCaps(written / "wavcaps", audio, check_counts=False)
    return DatasetsDataModule(train, folder, test, batch_size=4)


DATA = {
    "soundscapes": lambda written, record: soundscapes(),
    "folder": lambda written, record: FolderData(*own_folder(record), fractions=(0.5, 0.3, 0.2), **SHORT),
    "audiocaps": lambda written, record: audiocaps(written, **SHORT),
    "clotho": lambda written, record: clotho(written, sample_rate=RATE),
    "given datasets": given_datasets,
}
RETRIEVERS = {"tiny": lambda **options: TinyRetriever(width=8, **options), **MODELS}


def run(model, data):
    trainer = L.Trainer(
        fast_dev_run=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    return trainer.callback_metrics


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("model", RETRIEVERS)
def test_every_pair(written, record, model, data):
    torch.manual_seed(0)
    metrics = run(RETRIEVERS[model](sample_rate=RATE), DATA[data](written, record))
    assert torch.isfinite(metrics["test/mean_recall"])


@pytest.mark.parametrize("data", DATA)
def test_batches_have_the_same_keys(written, record, data):
    made = DATA[data](written, record)
    for loader in (made.train_dataloader(), made.val_dataloader(), made.test_dataloader()):
        batch = next(iter(loader))
        assert list(batch) == ["waveform", "num_samples", "caption", "clip_id", "caption_id"]
        rows = len(batch["caption"])
        assert batch["waveform"].shape[0] == rows
        assert batch["waveform"].dtype == torch.float32
        for name in ("num_samples", "clip_id", "caption_id"):
            assert batch[name].shape == (rows,)
            assert batch[name].dtype == torch.int64


def test_the_tiny_model_takes_spectrograms_as_well(written, record):
    run(TinyRetriever(width=8), soundscapes(features="log_mel"))
    folder, table = own_folder(record)
    run(
        TinyRetriever(width=8, num_mels=32),
        FolderData(folder, table, fractions=(0.5, 0.3, 0.2), features="log_mel", num_mels=32, **SHORT),
    )
