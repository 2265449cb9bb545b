"""Training with knowledge in files: the losses of knowledge in memory, exact resumes, nothing left."""

import gc
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from ask_lightning import ASKModule, KnowledgeDistillationLoss, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.knowledge.mapped_pairs import MappedPairs
from tests.helpers.clients import PlainTowers, Watcher, make_loader, make_refresh, make_trainer, wrap
from tests.helpers.interrupted_run import Stop, Stopped, fit


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("knowledge-rows-*"))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_losses_are_those_of_knowledge_in_memory(tmp_path, momentum):
    losses = {}
    for storage in ("float16", "memmap"):
        pl.seed_everything(0, verbose=False)
        watcher, module = Watcher(), wrap(PlainTowers())
        options = {"storage_directory": tmp_path} if storage == "memmap" else {}
        callback = make_refresh(1, storage=storage, momentum=momentum, **options)
        make_trainer(callbacks=[callback, watcher]).fit(module, make_loader())
        losses[storage] = watcher.losses
        assert isinstance(module.loss.knowledge.fine, MappedPairs) == (storage == "memmap")
        assert len(set(watcher.knowledge)) == 3
    assert losses["memmap"] == pytest.approx(losses["float16"], abs=5e-3)
    assert len(files(tmp_path)) == 2, "those of the base in use"
    del module, watcher, callback
    gc.collect()
    assert files(tmp_path) == []


def test_a_resumed_run_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    settings = {"storage": "memmap", "storage_directory": tmp_path / "rows"}
    model, whole, _ = fit(tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop=Stop(3), **settings)
    gc.collect()
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")  # rows move with the checkpoint
    resumed, watcher, _ = fit(tmp_path / "again", resume=tmp_path / "elsewhere" / "last.ckpt", **settings)
    assert watcher.knowledge == whole.knowledge[18:]
    assert watcher.losses == whole.losses[18:]
    for one, other in zip(resumed.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # Of superseded knowledge no file stays, of that of the last checkpoint all.
    kept = {
        path.name.partition("-")[2].partition(".")[2] for path in (tmp_path / "again").glob("knowledge-*")
    }
    assert kept == {"safetensors", "audio.npy", "text.npy"}
    assert len(list((tmp_path / "again").glob("knowledge-*"))) == 3


def test_rows_that_are_missing_are_encoded_anew(tmp_path):
    settings = {"storage": "memmap", "storage_directory": tmp_path / "rows"}
    with pytest.raises(Stopped):
        fit(tmp_path / "run", stop=Stop(3), **settings)
    for path in (tmp_path / "run").glob("*.audio.npy"):
        path.unlink()
    with pytest.warns(UserWarning, match=r"newly encoded knowledge.*lacks its rows"):
        fit(tmp_path / "again", resume=tmp_path / "run" / "last.ckpt", **settings)


def test_a_refresh_that_fails_leaves_the_old_knowledge(tmp_path, monkeypatch):
    """Whatever happens between writing and taking the new base, the one in use stays whole."""
    module, watcher = wrap(PlainTowers()), Watcher()
    callback = make_refresh(1, storage="memmap", storage_directory=tmp_path)
    original = KnowledgeBase.from_files.__func__

    def fails_later(cls, *arguments, **named):
        if module.loss.knowledge is not None:
            raise RuntimeError("cut off")
        return original(cls, *arguments, **named)

    monkeypatch.setattr(KnowledgeBase, "from_files", classmethod(fails_later))
    with pytest.raises(RuntimeError, match="cut off"):
        make_trainer(callbacks=[callback, watcher]).fit(module, make_loader())
    base = module.loss.knowledge
    assert len(watcher.losses) == 6
    assert base.fine.files.checksums() == base.fine.checksums
    gc.collect()
    assert len(files(tmp_path)) == 2


def test_the_teacher_reads_clips_from_the_files(tmp_path):
    losses = {}
    for storage in ("float16", "memmap"):
        pl.seed_everything(0, verbose=False)
        watcher = Watcher()
        module = ASKModule(PlainTowers(), KnowledgeDistillationLoss(temperature=0.2), ids="clip_id")
        options = {"storage_directory": tmp_path} if storage == "memmap" else {}
        callback = KnowledgeRefreshCallback(1, storage=storage, **options)
        make_trainer(callbacks=[callback, watcher]).fit(module, make_loader())
        losses[storage] = watcher.losses
    assert losses["memmap"] == pytest.approx(losses["float16"], abs=1e-5)


def test_write_back_into_files(tmp_path):
    """Each step's embeddings are found among the rows at once, and a resumed run goes on with them."""
    settings = {"storage": "memmap", "storage_directory": tmp_path / "rows", "write_back": True}
    found, ask = {}, {}
    for storage, options in (("memmap", settings), ("float16", {"write_back": True, "storage": "float16"})):
        pl.seed_everything(0, verbose=False)
        module = ASKModule(PlainTowers(), ReliabilityOTLoss(num_neighbors=4), ids="clip_id")
        callback = make_refresh(2, **options)
        make_trainer(callbacks=[callback], max_epochs=2).fit(module, make_loader())
        base = module.loss.knowledge
        found[storage], ask[storage] = base.fine.audio.float(), base.find_clips(base.ids[:5]).text
    torch.testing.assert_close(found["memmap"], found["float16"], atol=2e-2, rtol=0)
    torch.testing.assert_close(ask["memmap"], ask["float16"], atol=2e-2, rtol=0)


def test_the_default_directory_is_the_runs(tmp_path):
    module = wrap(PlainTowers())
    make_trainer(default_root_dir=tmp_path, callbacks=[make_refresh(storage="memmap")], max_epochs=1).fit(
        module, make_loader()
    )
    assert {Path(name).parent.name for name in files(tmp_path)} == {"knowledge_rows"}


def test_the_log_says_once_what_auto_has_become(monkeypatch):
    told = []
    monkeypatch.setattr("ask_lightning.callbacks.refresh_report.rank_zero_info", told.append)
    make_trainer(callbacks=[make_refresh(1)], max_epochs=2).fit(wrap(PlainTowers()), make_loader())
    assert told == ["The knowledge of 48 pairs is searched by index='exact', chosen by index=\"auto\"."]


def test_the_log_says_of_how_many_clips_the_pairs_are(monkeypatch):
    """Ids that are not those of clips, such as places in the batch, are seen by their number."""
    told = []
    monkeypatch.setattr("ask_lightning.callbacks.refresh_report.rank_zero_info", told.append)
    module = wrap(PlainTowers(), ids=lambda model, batch: batch["clip_id"] // 4)
    make_trainer(callbacks=[make_refresh(1)], max_epochs=1).fit(module, make_loader())
    assert told[0].startswith("The knowledge of 48 pairs of 12 clips is searched by")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "memmap", "refine": "graph"}, "`refine` compares every pair"),
        ({"storage": "memmap", "mode": "rolling"}, 'mode="rolling"` and `storage="memmap"` exclude'),
        ({"storage": "memmap", "prototype_pairing": "joint"}, 'another than "joint"'),
        ({"storage_directory": "rows"}, r"`storage_directory` is for storage=\"memmap\" alone"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeRefreshCallback(**settings)
