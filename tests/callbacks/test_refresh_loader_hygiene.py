"""A refresh leaves no worker, no file and no memory behind, and takes nothing of ours into the workers."""

import gc
import multiprocessing
import os
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from ask_lightning import KnowledgeBase
from ask_lightning.knowledge.exact_search import FastestExactSearch
from ask_lightning.knowledge.faiss_search import FaissSearch
from tests.helpers.clients import Pairs, PlainTowers, Watcher, make_refresh, make_trainer, wrap
from tests.helpers.ranks import on_ranks


class Visited(Pairs):
    """Notes in its items who reads them and what is loaded there; its workers set themselves up."""

    prepared = False

    def __getitem__(self, row: int) -> dict:
        worker = get_worker_info()
        state = [os.getpid(), worker is not None, "faiss" in sys.modules, self.prepared]
        return super().__getitem__(row) | {"state": torch.tensor(state)}


class Breaking(Pairs):
    def __getitem__(self, row: int) -> dict:
        if row == 30:
            raise OSError("clip 30 cannot be read")
        return super().__getitem__(row)


def prepare(worker: int) -> None:
    """What users do in their workers: reach for the dataset itself."""
    get_worker_info().dataset.prepared = True


class Notes(PlainTowers):
    """Keeps what the source's batches say."""

    def encode_audio(self, batch):
        if not self.training and "state" in batch:
            self.notes = [*getattr(self, "notes", []), *batch["state"].tolist()]
        return super().encode_audio(batch)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    with open("/proc/self/statm") as memory:
        return int(memory.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_are_the_users_and_end_with_the_refresh(method):
    before = set(multiprocessing.active_children())
    source = DataLoader(
        Visited(32),
        8,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=True,
        prefetch_factor=3,
        worker_init_fn=prepare,
    )
    model = Notes()
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(source=source)])
    run.fit(wrap(model), DataLoader(Pairs(16), 8))
    processes, in_worker, faiss_loaded, prepared = zip(*model.notes, strict=True)
    assert len(set(processes)) == 2
    assert os.getpid() not in processes
    assert all(in_worker)
    assert all(prepared)
    if method == "spawn":
        assert not any(faiss_loaded)
    assert set(multiprocessing.active_children()) == before


def test_workers_end_when_a_clip_cannot_be_read():
    before = set(multiprocessing.active_children())
    run = make_trainer(
        max_epochs=1, callbacks=[make_refresh(source=DataLoader(Breaking(32), 8, num_workers=2))]
    )
    with pytest.raises(OSError, match="clip 30") as caught:
        run.fit(wrap(PlainTowers()), DataLoader(Pairs(16), 8))
    # The error, and with it the loop's variables, is still held here.
    assert caught.value is not None
    assert set(multiprocessing.active_children()) == before


def test_persistent_workers_of_the_training_loader_go_on():
    training = DataLoader(Pairs(32), 8, num_workers=1, persistent_workers=True)
    seen = []

    class Children(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            seen.append({child.pid for child in multiprocessing.active_children()})

    make_trainer(max_epochs=3, callbacks=[make_refresh(1), Children()]).fit(wrap(PlainTowers()), training)
    assert len(seen[0]) == 1
    assert seen[0] == seen[1] == seen[2]


def test_a_reloaded_training_set_is_the_source():
    class Growing(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Pairs(16 + 8 * self.trainer.current_epoch), 8)

    sizes = []

    class Sizes(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            sizes.append(len(pl_module.loss.knowledge.fine))

    run = make_trainer(
        max_epochs=3, callbacks=[make_refresh(1), Sizes()], reload_dataloaders_every_n_epochs=1
    )
    run.fit(wrap(PlainTowers()), datamodule=Growing())
    assert sizes == [16, 24, 32]


def use_of_a_hundred_refreshes(index: str) -> list[tuple[int, list[int], int]]:
    """Open files, bases and indexes alive, and memory after refresh 30 and after refresh 100."""
    seen = []

    class Use(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch in (30, 99):
                gc.collect()
                alive = [type(thing) for thing in gc.get_objects()]
                kinds = [alive.count(kind) for kind in (KnowledgeBase, FastestExactSearch, FaissSearch)]
                seen.append((open_files(), kinds, resident_bytes()))

    source = DataLoader(Pairs(2000), 1000)
    run = make_trainer(
        max_epochs=100, limit_train_batches=1, callbacks=[make_refresh(1, source, index=index), Use()]
    )
    run.fit(wrap(PlainTowers()), DataLoader(Pairs(16), 8))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("index", ["auto", "Flat"])
def test_a_hundred_refreshes_leave_nothing(index):
    """In a process of its own, whose memory is not that of all the tests before."""
    if index == "Flat":
        pytest.importorskip("faiss")
    ((before, after),) = on_ranks(1, use_of_a_hundred_refreshes, index, grouped=False)
    assert after[:2] == before[:2]
    # Allocators keep what they please, but not seventy times anything.
    assert after[2] - before[2] < 128 << 20


@pytest.mark.slow
def test_twenty_refreshes_with_workers_leave_no_file():
    seen = []

    class Use(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            gc.collect()
            seen.append(open_files())

    source = DataLoader(Pairs(32), 8, num_workers=1)
    run = make_trainer(
        max_epochs=20, limit_train_batches=1, callbacks=[make_refresh(1, source), Use(), Watcher()]
    )
    run.fit(wrap(PlainTowers()), DataLoader(Pairs(16), 8))
    assert max(seen[5:]) <= seen[4]
