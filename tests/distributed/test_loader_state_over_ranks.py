"""Places in stateful loaders whose order Lightning divides among the processes of a run."""

import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import WeightedRandomSampler

from ask_lightning.callbacks import LoaderStateCallback
from tests.helpers.clients import Pairs, PlainTowers, Watcher, make_refresh, make_trainer, wrap
from tests.helpers.ranks import on_ranks
from tests.helpers.streams import write_chunks

STEPS = 4  # of an epoch


class SaveAt(pl.Callback):
    """Writes checkpoints behind some batches."""

    def __init__(self, folder: Path, moments: list[tuple[int, int]]) -> None:
        self.folder, self.moments = folder, moments

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) in self.moments:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")


def make_loader(kind: str):
    from torchdata.stateful_dataloader import StatefulDataLoader

    pairs, generator = Pairs(32), torch.Generator().manual_seed(3)
    torch.rand(2, generator=generator)  # it is not as it was made
    if kind == "weights":
        sampler = WeightedRandomSampler(torch.ones(32), 32, generator=generator)
        return StatefulDataLoader(pairs, 4, sampler=sampler)
    return StatefulDataLoader(pairs, 4, shuffle=True, generator=generator if kind == "generator" else None)


def fit(kind: str, folder: Path, moments=(), resume=None) -> list[list[int]]:
    """The clips of the batches of three epochs."""
    pl.seed_everything(1, verbose=False)
    loader, watcher = make_loader(kind), Watcher()
    callbacks = [watcher, LoaderStateCallback(), SaveAt(folder, moments)]
    run = make_trainer(max_epochs=3, devices=2, strategy="ddp", callbacks=callbacks)
    run.fit(PlainTowers(), loader, ckpt_path=resume)
    assert isinstance(run.train_dataloader.batch_sampler.sampler, DistributedSamplerWrapper)
    return watcher.clips


def fit_from_seeds_of_ranks() -> list[str]:
    """What is warned of where each rank shuffles in its own way."""
    torch.manual_seed(int(os.environ["RANK"]))
    run = make_trainer(max_steps=1, devices=2, strategy="ddp", callbacks=[LoaderStateCallback()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(PlainTowers(), make_loader("shuffle"))
    return [str(each.message) for each in caught]


def fit_and_resume(kind: str, directory: str) -> dict:
    folder, moments = Path(directory), [(0, 1), (1, 2), (1, 3)]
    whole = fit(kind, folder, moments)
    resumed = {at: fit(kind, folder, resume=folder / "{}-{}.ckpt".format(*at)) for at in moments}
    fit(kind, folder, [(1, 2)], resume=folder / "0-1.ckpt")
    again = fit(kind, folder, resume=folder / "1-2.ckpt")
    return {"whole": whole, "resumed": resumed, "resumed_again": again}


@pytest.mark.parametrize("kind", ["shuffle", "generator", "weights"])
def test_a_shuffle_that_lightning_divides(kind, tmp_path):
    pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    ranks = on_ranks(2, fit_and_resume, kind, str(tmp_path), grouped=False)
    for rank in ranks:
        whole = rank["whole"]
        assert len(whole) == 3 * STEPS
        assert whole[:STEPS] != whole[STEPS : 2 * STEPS] != whole[2 * STEPS :]
        for (epoch, batch), clips in rank["resumed"].items():
            assert clips == whole[epoch * STEPS + batch + 1 :], (epoch, batch)
        assert rank["resumed_again"] == whole[STEPS + 3 :]
    if kind != "weights":
        for step in range(0, 3 * STEPS, STEPS):
            of_epoch = [
                clip for rank in ranks for batch in rank["whole"][step : step + STEPS] for clip in batch
            ]
            assert sorted(of_epoch) == list(range(32))


def fit_on(devices: int, folder: Path, moments=(), resume=None) -> list[list[int]]:
    """The clips of the batches of three epochs, each of four on one process and on two."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    pl.seed_everything(1, verbose=False)
    watcher = Watcher()
    callbacks = [watcher, LoaderStateCallback(), SaveAt(folder, moments)]
    strategy = "ddp" if devices > 1 else "auto"
    run = make_trainer(max_epochs=3, devices=devices, strategy=strategy, callbacks=callbacks)
    run.fit(PlainTowers(), StatefulDataLoader(Pairs(32), 8 // devices, shuffle=True), ckpt_path=resume)
    return watcher.clips


def fit_on_two(directory: str, moments=(), resume=None) -> list[list[int]]:
    return fit_on(2, Path(directory), moments, resume)


@pytest.mark.parametrize("before", [1, 2])
def test_the_next_epoch_is_whole_on_another_number_of_processes(before, tmp_path):
    pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    moments, path = [(0, STEPS - 1)], str(tmp_path / f"0-{STEPS - 1}.ckpt")
    if before == 1:
        fit_on(1, tmp_path, moments)
        ranks = on_ranks(2, fit_on_two, str(tmp_path), (), path, grouped=False)
    else:
        on_ranks(2, fit_on_two, str(tmp_path), moments, grouped=False)
        ranks = [fit_on(1, tmp_path, resume=path)]
    assert [len(clips) for clips in ranks] == [2 * STEPS] * len(ranks)
    for step in (0, STEPS):
        epoch = [clip for clips in ranks for batch in clips[step : step + STEPS] for clip in batch]
        assert sorted(epoch) == list(range(32))


def test_a_shuffle_of_each_ranks_own_is_pointed_at():
    pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    first, second = on_ranks(2, fit_from_seeds_of_ranks, grouped=False)
    assert [text for text in first if "Each process has shuffled" in text and "seed_everything" in text]
    assert not [text for text in second if "Each process has shuffled" in text]


class Chunks(pl.LightningDataModule):
    """Makes its dataset when the processes know each other, which litdata asks for in its constructor."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory

    def train_dataloader(self):
        import litdata

        dataset = litdata.StreamingDataset(self.directory, shuffle=True, drop_last=True)
        return litdata.StreamingDataLoader(dataset, batch_size=6)


def fit_on_chunks(directory: str, moments=(), resume=None) -> tuple:
    """Batches, losses and knowledge of three epochs with a refresh in every second one, and the weights."""
    pl.seed_everything(1, verbose=False)
    watcher, module = Watcher(), wrap(PlainTowers())
    callbacks = [
        watcher,
        make_refresh(2),
        LoaderStateCallback(),
        SaveAt(Path(directory), moments),
    ]
    run = make_trainer(
        max_epochs=3, devices=2, strategy="ddp", callbacks=callbacks, default_root_dir=directory
    )
    run.fit(module, datamodule=Chunks(f"{directory}/chunks"), ckpt_path=resume)
    seen = list(zip(watcher.clips, watcher.losses, watcher.knowledge, strict=True))
    return seen, module.model.state_dict()


def fit_and_resume_on_chunks(directory: str) -> tuple:
    moments = [(1, 2), (1, 3)]
    whole = fit_on_chunks(directory, moments)
    paths = {at: Path(directory, "{}-{}.ckpt".format(*at)) for at in moments}
    return whole, {at: fit_on_chunks(directory, resume=path) for at, path in paths.items()}


@pytest.mark.slow
def test_chunks_that_litdata_divides(tmp_path):
    pytest.importorskip("litdata", reason="litdata is not installed")
    write_chunks(tmp_path / "chunks", 48)
    ranks = on_ranks(2, fit_and_resume_on_chunks, str(tmp_path), grouped=False)
    for (seen, weights), resumed in ranks:
        assert len(seen) == 3 * STEPS
        for (epoch, batch), (later, end) in resumed.items():
            assert later == seen[epoch * STEPS + batch + 1 :], (epoch, batch)
            assert all(torch.equal(end[name], weight) for name, weight in weights.items())
    for step in range(0, 3 * STEPS, STEPS):
        clips = [clip for (seen, _), _ in ranks for batch, *_ in seen[step : step + STEPS] for clip in batch]
        assert sorted(clips) == list(range(48))
