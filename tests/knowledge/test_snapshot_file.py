"""`KnowledgeBase.save` and `load`: bit for bit, whole or not at all."""

import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from ask_lightning.knowledge import KnowledgeBase, snapshot_file
from ask_lightning.knowledge.exact_search import ExactSearch, FastestExactSearch
from ask_lightning.knowledge.faiss_search import FaissSearch
from ask_lightning.knowledge.snapshot_file import SnapshotError, read_snapshot, write_snapshot
from tests.helpers.vectors import directions, tensors_in, tensors_of


def make(rows: int = 60, seed: int = 0, *, width: int = 6, dtype=torch.float32, **options) -> KnowledgeBase:
    audio, text = directions(rows, width, seed, dtype), directions(rows, width, seed + 1, dtype)
    return KnowledgeBase.from_embeddings(audio, text, **{"num_prototypes": 5, **options})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "knowledge.safetensors"


class TestRoundTrip:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(
        "ids", [None, [i // 5 for i in range(60)], [f"clip {i // 5}" for i in range(60)]]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_bit_for_bit(self, path, dtype, ids, normalize):
        base = make(dtype=dtype, ids=ids, normalize_prototypes=normalize)
        base.save(path)
        loaded = KnowledgeBase.load(path)
        for name, tensor in tensors_of(base).items():
            assert torch.equal(tensors_of(loaded)[name], tensor)
            assert tensors_of(loaded)[name].dtype == tensor.dtype
        assert loaded.fingerprint == base.fingerprint
        assert repr(loaded) == repr(base)

    def test_string_ids_exclude_the_same_rows(self, path):
        base = make(ids=[f"clip {i // 5}" for i in range(60)])
        base.save(path)
        audio, text = base.fine.audio[[0, 17, 59]], base.fine.text[[0, 17, 59]]
        own = ["clip 0", "clip 3", "clip 11"]
        expected = base.lookup(audio, text, 20, exclude_ids=own)["fine"].audio_rows
        found = KnowledgeBase.load(path).lookup(audio, text, 20, exclude_ids=own)["fine"].audio_rows
        assert torch.equal(found, expected)
        assert not bool((found // 5 == torch.tensor([[0], [3], [11]])).any())

    @pytest.mark.parametrize(
        ("index", "kind"),
        [
            ("auto", FastestExactSearch),
            ("exact", ExactSearch),
            ("Flat", FaissSearch),
            ("IVF4,Flat;nprobe=4", FaissSearch),
        ],
    )
    def test_indexes_are_rebuilt(self, path, index, kind):
        if kind is FaissSearch:
            pytest.importorskip("faiss")
        base = make(300, index=index)
        base.save(path)
        loaded = KnowledgeBase.load(path)
        assert loaded.fine.index == index
        assert isinstance(loaded.fine.search_audio, kind)
        assert isinstance(loaded.coarse.search_audio, ExactSearch)
        audio, text = directions(9, 6, 7), directions(9, 6, 8)
        expected = base.lookup(audio, text, 5)
        for name, found in loaded.lookup(audio, text, 5).items():
            for one, other in zip(tensors_in(found), tensors_in(expected[name]), strict=True):
                assert torch.equal(one, other)

    def test_a_string_as_path_and_directories_that_are_not_there_yet(self, tmp_path):
        base = make()
        base.save(f"{tmp_path}/some/where/knowledge")
        assert KnowledgeBase.load(f"{tmp_path}/some/where/knowledge").fingerprint == base.fingerprint
        assert os.listdir(tmp_path / "some" / "where") == ["knowledge"]

    def test_to_a_device(self, path):
        make().save(path)
        assert KnowledgeBase.load(path, device="meta").device == torch.device("meta")

    def test_a_new_snapshot_replaces_the_old_under_a_loaded_base(self, path):
        old, new = make(seed=0), make(seed=5)
        old.save(path)
        loaded = KnowledgeBase.load(path)
        new.save(path)
        assert loaded.fingerprint == old.fingerprint  # not a view of the file
        assert KnowledgeBase.load(path).fingerprint == new.fingerprint

    def test_saving_what_was_loaded_onto_itself(self, path):
        make().save(path)
        KnowledgeBase.load(path).save(path)
        assert KnowledgeBase.load(path).fingerprint == make().fingerprint

    def test_any_program_can_read_it(self, path):
        base = make()
        base.save(path)
        stored = load_file(path)
        assert sorted(stored) == ["coarse_audio", "coarse_text", "fine_audio", "fine_text", "ids"]
        assert torch.equal(stored["fine_text"], base.fine.text)


@pytest.fixture(scope="module")
def bases():
    return [make(4000, seed, width=64) for seed in (0, 5)]


def write_slowly(tensors, filename, metadata):
    """`save_file` as on a slow disk: at nearly every moment the file is there in part."""
    content = save(tensors, metadata)
    with open(filename, "wb", buffering=0) as file:
        for first in range(0, len(content), len(content) // 20):
            file.write(content[first : first + len(content) // 20])
            time.sleep(0.001)


@pytest.mark.parametrize("writing", [save_file, write_slowly])
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
class TestAtomic:
    @contextmanager
    def writer(self, path, bases, writing):
        """Another process that writes one base over the other until it is killed."""

        def write_in_turns() -> None:
            snapshot_file.save_file = writing
            while True:
                for base in bases:
                    base.save(path)

        process = multiprocessing.get_context("fork").Process(target=write_in_turns)
        process.start()
        try:
            while not path.exists():
                assert process.is_alive()
                time.sleep(0.001)
            yield
            assert process.is_alive()
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL

    def test_killed_at_any_moment(self, path, bases, writing):
        """Whatever the moment, the path holds one of the two bases, whole."""
        for attempt in range(12):
            with self.writer(path, bases, writing):
                time.sleep(0.0137 * attempt % 0.05)
            assert KnowledgeBase.load(path).fingerprint in {base.fingerprint for base in bases}
        # What killed writers left behind does not disturb the next one.
        make().save(path)
        assert KnowledgeBase.load(path).fingerprint == make().fingerprint

    def test_a_reader_beside_the_writer(self, path, bases, writing):
        with self.writer(path, bases, writing):
            for _ in range(40):
                assert KnowledgeBase.load(path).fingerprint in {base.fingerprint for base in bases}


class TestFailingWrite:
    @pytest.fixture
    def old(self, path):
        base = make(seed=5)
        base.save(path)
        return base

    def check_untouched(self, path, old):
        assert KnowledgeBase.load(path).fingerprint == old.fingerprint
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (OSError(28, "No space left on device"), "No space left"),
            (SafetensorError("Error while serializing: No space left"), r"Cannot write .*: .*No space left"),
        ],
    )
    def test_a_full_disk_leaves_the_old_file(self, monkeypatch, path, old, error, expected):
        def half(tensors, filename, metadata):
            Path(filename).write_bytes(b"half of it")
            raise error

        monkeypatch.setattr(snapshot_file, "save_file", half)
        with pytest.raises(OSError, match=expected):
            make().save(path)
        self.check_untouched(path, old)

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_failing_last_step_leaves_the_old_file(self, monkeypatch, path, old, step):
        def fail(*_):
            raise OSError("Input/output error")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="Input/output error"):
                make().save(path)
        self.check_untouched(path, old)

    def test_an_interrupt_leaves_the_old_file(self, monkeypatch, path, old):
        def interrupt(tensors, filename, metadata):
            Path(filename).write_bytes(b"half of it")
            raise KeyboardInterrupt

        monkeypatch.setattr(snapshot_file, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make().save(path)
        self.check_untouched(path, old)

    def test_data_are_on_the_disk_before_the_name(self, monkeypatch, path):
        done = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda *given: (done.append("fsync"), fsync(*given)))
        monkeypatch.setattr(os, "replace", lambda *given: (done.append("replace"), replace(*given)))
        make().save(path)
        assert done == ["fsync", "replace"]

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            make().save(tmp_path / "file" / "knowledge")

    def test_a_directory_in_the_place_of_the_file(self, tmp_path):
        (tmp_path / "knowledge").mkdir()
        with pytest.raises(OSError, match="knowledge"):
            make().save(tmp_path / "knowledge")
        assert os.listdir(tmp_path) == ["knowledge"]


class TestRefused:
    def test_missing(self, path):
        with pytest.raises(SnapshotError, match=f"There is no knowledge snapshot at {path}"):
            KnowledgeBase.load(path)

    def test_a_directory(self, tmp_path):
        with pytest.raises(SnapshotError, match="There is no knowledge snapshot at"):
            KnowledgeBase.load(tmp_path)

    @pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.5, 0.9, 0.9999])
    def test_truncated(self, path, share):
        make(600).save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(SnapshotError, match=f"The knowledge snapshot {path} is damaged: "):
            KnowledgeBase.load(path)

    def test_truncated_at_every_kind_of_place(self, path):
        make(2, num_prototypes=1, width=1).save(path)
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(SnapshotError, match="is damaged: "):
                KnowledgeBase.load(path)

    @pytest.mark.parametrize("content", [b"\0" * 5000, b"\xff" * 5000, b"not a snapshot at all", b"{}" * 100])
    def test_garbage(self, path, content):
        path.write_bytes(content)
        with pytest.raises(SnapshotError, match="is damaged: "):
            KnowledgeBase.load(path)

    @pytest.mark.parametrize(
        ("metadata", "got"),
        [
            (None, "None"),
            ({"format": "pt"}, "'pt'"),
            ({"format": "ask-lightning knowledge 99"}, "'ask.* 99'"),
        ],
    )
    def test_another_safetensors_file(self, path, metadata, got):
        save_file({"weight": torch.ones(3)}, path, metadata=metadata)
        message = (
            f"is not a knowledge snapshot that this version reads: its format is {got}, not 'ask-lightning"
        )
        with pytest.raises(SnapshotError, match=message):
            KnowledgeBase.load(path)

    @pytest.mark.parametrize("name", ["fine_audio", "fine_text", "coarse_audio", "coarse_text", "ids"])
    def test_a_missing_tensor(self, path, name):
        tensors = tensors_of(make())
        del tensors[name]
        write_snapshot(path, tensors, {"index": "exact"})
        with pytest.raises(SnapshotError, match=f"The knowledge snapshot {path} lacks '{name}'"):
            KnowledgeBase.load(path)

    def test_a_missing_setting(self, path):
        write_snapshot(path, tensors_of(make()), {})
        with pytest.raises(SnapshotError, match="lacks 'index'"):
            KnowledgeBase.load(path)

    @pytest.mark.parametrize("settings", [None, "{", "[1, 2"])
    def test_settings_that_cannot_be_read(self, path, settings):
        metadata = {"format": snapshot_file._FORMAT} | ({} if settings is None else {"settings": settings})
        save_file(tensors_of(make()), path, metadata=metadata)
        with pytest.raises(SnapshotError, match="is damaged: "):
            KnowledgeBase.load(path)


def test_tensors_and_settings_of_any_name(path):
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5, requires_grad=True)}
    settings = {"text": "ü", "list": [1, None], "number": 0.1}
    write_snapshot(path, tensors, settings)
    read, about = read_snapshot(path)
    assert about == settings == json.loads(json.dumps(about))
    assert torch.equal(read["a"], tensors["a"])
    assert torch.equal(read["b"], tensors["b"].detach())
