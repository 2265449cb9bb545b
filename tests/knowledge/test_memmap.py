"""Knowledge in files: the same as in memory, and whole files or none."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase, base_file, file_search, row_files
from ask_lightning.knowledge.file_search import FileSearch, index_for_file
from ask_lightning.knowledge.row_files import PairWriter, RowFile, RowFileError, remove_abandoned
from ask_lightning.knowledge.row_shard import RowShard
from ask_lightning.knowledge.snapshot_file import SnapshotError, files_of_snapshot
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.ranks import on_ranks
from tests.helpers.sharded_bases import shard_of, source
from tests.helpers.vectors import directions, needs_gpu

ROWS, WIDTH, K = 400, 16, 5


def make(folder: Path, storage: str = "memmap", seed: int = 0, **options) -> KnowledgeBase:
    audio, text = directions(ROWS, WIDTH, seed), directions(ROWS, WIDTH, seed + 1)
    if storage == "memmap":
        options["directory"] = folder
    return KnowledgeBase.from_embeddings(
        audio,
        text,
        storage=storage,
        **{"num_prototypes": 7, "ids": [row // 2 for row in range(ROWS)]} | options,
    )


def queries(batch: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    return directions(batch, WIDTH, 5), directions(batch, WIDTH, 6)


def row_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.npy"))


class TestSameAsInMemory:
    @pytest.mark.parametrize("options", [{}, {"exclude_ids": [3] * 9}, {"distinct_clips": True}])
    def test_fine_lookup(self, tmp_path, options):
        base, expected = make(tmp_path), make(tmp_path, "float16", index="exact")
        for one, other in ((base, expected), (base.to("cpu"), expected)):
            found = one.lookup(*queries(), K, granularities=("fine",), **options)["fine"]
            wanted = other.lookup(*queries(), K, granularities=("fine",), **options)["fine"]
            for name, value in vars(wanted).items():
                assert torch.equal(getattr(found, name), value), name

    def test_prototypes_are_those_of_the_stored_rows(self, tmp_path):
        base = make(tmp_path)
        again = KnowledgeBase.from_embeddings(
            base.fine.audio.float(), base.fine.text.float(), num_prototypes=7, index="exact"
        )
        torch.testing.assert_close(base.coarse.audio, again.coarse.audio, atol=2e-3, rtol=0)

    def test_numbers(self, tmp_path):
        base, expected = make(tmp_path), make(tmp_path, "float16", index="exact")
        assert base.fine.checksums == expected.fine.checksums
        assert base.fine.is_bounded is expected.fine.is_bounded is True
        for mean, other in zip(base.fine.mean, expected.fine.mean, strict=True):
            torch.testing.assert_close(mean, other)
        assert base.num_bytes == base.coarse.num_bytes

    def test_drift_is_that_of_float64(self, tmp_path):
        now, before = make(tmp_path, seed=0), make(tmp_path, seed=10)
        rows = torch.arange(0, ROWS, 40)
        for name, drift in zip(("audio", "text"), now.fine.drift_from(before.fine, rows), strict=True):
            own, new, old = (
                side.double()
                for side in (
                    getattr(now.fine, name)[rows],
                    getattr(now.fine, name),
                    getattr(before.fine, name),
                )
            )
            log_p, log_q = (own @ new.T).log_softmax(dim=1), (own @ old.T).log_softmax(dim=1)
            assert float(drift) == pytest.approx(
                float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()), rel=1e-4
            )

    def test_clips(self, tmp_path):
        base, expected = make(tmp_path), make(tmp_path, "float16", index="exact")
        ids = torch.tensor([0, 7, 10_000, 199])
        found, wanted = base.find_clips(ids), expected.find_clips(ids)
        torch.testing.assert_close(found.audio, wanted.audio, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.text, wanted.text, atol=1e-6, rtol=0)
        assert found.known.tolist() == wanted.known.tolist() == [True, True, False, True]

    def test_training_with_a_clip_of_many_rows_and_one(self, tmp_path):
        base = make(tmp_path, ids=[0] * (ROWS - 1) + [1])
        mean = base.fine.audio[:-1].double().sum(dim=0)
        torch.testing.assert_close(
            base.find_clips(torch.tensor([0])).audio[0].double(), mean / mean.norm(), atol=1e-5, rtol=0
        )


class TestIndex:
    def test_which(self):
        assert index_for_file(50_000, 512) == "exact"
        assert index_for_file(1_000_000, 512) == "IVF512,PQ128x4fs"
        assert index_for_file(10_000_000, 96) == "IVF2048,PQ24x4fs"
        assert index_for_file(60_000, 7) == "IVF128,PQ1x4fs"

    @pytest.mark.parametrize("index", ["IVF8,PQ4x4fs;nprobe=8", "IVF8,Flat;nprobe=8", "HNSW16"])
    def test_candidates_are_scored_from_the_file(self, tmp_path, index):
        pytest.importorskip("faiss")
        base, exact = make(tmp_path, index=index), make(tmp_path, index="exact")
        for one, other in ((base.fine.search_audio, exact.fine.search_audio),):
            scores, rows = one(queries()[0], K)
            expected_scores, expected = other(queries()[0], K)
            hits = (rows[:, :, None] == expected[:, None]).any(dim=1).float().mean()
            assert hits > 0.9
            same = (rows == expected).all(dim=1)
            torch.testing.assert_close(scores[same], expected_scores[same], atol=1e-6, rtol=0)

    def test_short_lists_are_completed_by_the_file(self, tmp_path):
        pytest.importorskip("faiss")
        base, exact = make(tmp_path, index="IVF16,Flat;nprobe=1"), make(tmp_path, index="exact")
        rows = base.fine.search_audio(queries()[0], 200)[1]
        assert torch.equal(rows, exact.fine.search_audio(queries()[0], 200)[1])

    def test_an_index_that_cannot_work_fails_when_made(self, tmp_path):
        pytest.importorskip("faiss")
        with pytest.raises(ValueError, match="Faiss factory string"):
            make(tmp_path, index="nonsense")
        gc.collect()
        assert row_names(tmp_path) == []


class TestRowsReplaced:
    @pytest.mark.parametrize("index", ["exact", "IVF8,PQ4x4fs;nprobe=8"])
    def test_searches_follow(self, tmp_path, index):
        pytest.importorskip("faiss")
        base = make(tmp_path, index=index)
        before = base.fine.checksums
        own, fresh = queries(3)
        base.fine.replace(torch.tensor([4, 399, 17]), own, fresh)
        scores, rows = base.fine.search_audio(own, 1)
        assert rows.flatten().tolist() == [4, 399, 17]
        torch.testing.assert_close(scores.flatten(), torch.ones(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(
            base.fine.pairs(torch.tensor([17]))[1][0].float(), fresh[2], atol=1e-3, rtol=0
        )
        assert base.fine.checksums != before

    @pytest.mark.parametrize("most", [199, 200])
    def test_many_changes_rebuild_the_index(self, tmp_path, monkeypatch, most):
        pytest.importorskip("faiss")
        monkeypatch.setattr(file_search, "_MOST_CHANGED", most)
        base = make(tmp_path, index="IVF8,Flat;nprobe=8")
        rows = torch.arange(0, ROWS, 2)
        fresh = directions(len(rows), WIDTH, 77)
        base.fine.replace(rows, fresh, fresh)
        assert torch.equal(base.fine.search_audio(fresh, 1)[1].flatten(), rows)
        assert len(base.fine.search_audio._changed) == (0 if most < 200 else 200)
        rows = base.fine.search_audio(queries()[0], K)[1]
        expected = make(tmp_path, index="exact")
        expected.fine.replace(torch.arange(0, ROWS, 2), fresh, fresh)
        assert torch.equal(rows, expected.fine.search_audio(queries()[0], K)[1])

    def test_a_snapshot_stays_as_it_was(self, tmp_path):
        base = make(tmp_path / "rows")
        path = tmp_path / "kept" / "base.safetensors"
        base.save(path)
        fingerprint, stored = base.fingerprint, base.fine.audio.clone()
        base.fine.replace(torch.tensor([1]), *queries(1))
        loaded = KnowledgeBase.load(path)
        assert loaded.fingerprint == fingerprint
        assert torch.equal(loaded.fine.audio, stored)
        # Nor does writing into the loaded one change the snapshot.
        loaded.fine.replace(torch.tensor([2]), *queries(1))
        assert KnowledgeBase.load(path).fingerprint == fingerprint


class TestSnapshot:
    def test_is_the_same_base_without_a_copy(self, tmp_path):
        base = make(tmp_path / "rows")
        path = tmp_path / "kept" / "base.safetensors"
        base.save(path)
        assert {file.name for file in files_of_snapshot(path)} == {
            "base.safetensors",
            "base.audio.npy",
            "base.text.npy",
        }
        assert os.path.samefile(path.with_name("base.audio.npy"), base.fine.files.audio.path)
        loaded = KnowledgeBase.load(path)
        assert loaded.fingerprint == base.fingerprint
        found, expected = (one.lookup(*queries(), K) for one in (loaded, base))
        for name in ("fine", "coarse"):
            for left, right in zip(vars(found[name]).values(), vars(expected[name]).values(), strict=True):
                assert torch.equal(left, right)
        del base
        gc.collect()
        assert row_names(tmp_path / "rows") == []
        assert KnowledgeBase.load(path).fingerprint == loaded.fingerprint

    def test_of_which_only_the_rows_could_be_written_leaves_nothing(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        base = make(tmp_path / "rows")
        monkeypatch.setattr(base_file, "write_snapshot", full)
        with pytest.raises(OSError, match="No space left"):
            base.save(tmp_path / "base.safetensors")
        assert list(tmp_path.glob("base*")) == []

    @pytest.mark.parametrize("damage", ["missing", "cut", "changed", "other"])
    def test_damage_is_told(self, tmp_path, damage):
        path = tmp_path / "base.safetensors"
        make(tmp_path / "rows").save(path)
        gc.collect()
        rows = tmp_path / "base.audio.npy"
        if damage == "missing":
            rows.unlink()
        elif damage == "cut":
            os.truncate(rows, rows.stat().st_size - 2)
        elif damage == "changed":
            RowFile(rows).write(torch.tensor([3]), torch.zeros(1, WIDTH))
        else:
            rows.write_bytes(b"no rows")
        with pytest.raises(SnapshotError, match=r"lacks its rows|checksum of its rows"):
            KnowledgeBase.load(path)


class TestFiles:
    def test_are_removed_with_the_base(self, tmp_path):
        base = make(tmp_path)
        assert len(row_names(tmp_path)) == 2
        moved = base.to("cpu")
        del base
        gc.collect()
        assert len(row_names(tmp_path)) == 2
        del moved
        gc.collect()
        assert row_names(tmp_path) == []

    def test_are_numpy_files(self, tmp_path):
        np = pytest.importorskip("numpy")
        base = make(tmp_path)
        assert np.array_equal(np.load(base.fine.files.text.path, mmap_mode="r"), base.fine.text.numpy())

    @pytest.mark.parametrize("sizes", [[0], [0, 3], [2, 0, 1]])
    def test_blocks_without_rows(self, tmp_path, sizes):
        rows = torch.eye(3)
        writer = PairWriter(tmp_path)
        for block in rows[: sum(sizes)].split(sizes):
            writer.append(block, block)
        files = writer.finish(3)
        assert files.audio.shape == (sum(sizes), 3)
        assert torch.equal(files.text.mapped, rows[: sum(sizes)].half())

    def test_of_a_killed_process_are_removed_later(self, tmp_path):
        code = (
            "import sys, time, torch; from pathlib import Path;"
            "from ask_lightning.knowledge.row_files import PairWriter;"
            "writer = PairWriter(Path(sys.argv[1])); writer.append(torch.eye(4), torch.eye(4));"
            "files = writer.finish() if sys.argv[2] == 'finished' else None;"
            "print('ready', flush=True); time.sleep(600)"
        )
        for state in ("finished", "half"):
            with subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path), state], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout.readline() == "ready\n"
                for path in tmp_path.glob("*.npy"):
                    os.utime(path, (0, 0))
                remove_abandoned(tmp_path)
                assert len(row_names(tmp_path)) == 2  # in use, however old they look
                process.send_signal(signal.SIGKILL)
            assert len(row_names(tmp_path)) == 2
            for path in tmp_path.glob("*.npy"):
                os.utime(path)
            remove_abandoned(tmp_path)
            assert len(row_names(tmp_path)) == 2  # too young to be sure
            for path in tmp_path.glob("*.npy"):
                os.utime(path, (time.time() - 7200,) * 2)
            make(tmp_path)
            gc.collect()
            assert row_names(tmp_path) == []

    def test_a_directory_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"cannot be written to .*file.*storage_directory"):
            make(tmp_path / "file")

    @pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="needs rights that can be withheld")
    def test_a_read_only_directory(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match=r"Permission denied.*storage_directory"):
            make(tmp_path)

    def test_a_full_disk_is_noticed_before_the_first_row(self, tmp_path, monkeypatch):
        usage = type("Usage", (), {"free": 1000})()
        monkeypatch.setattr(row_files.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"0\.0 GB are needed and 0\.0 GB are free.*storage_directory"):
            make(tmp_path)
        gc.collect()
        assert row_names(tmp_path) == []

    def test_a_disk_that_fills_up(self, tmp_path, monkeypatch):
        writer = PairWriter(tmp_path)
        writer.append(torch.eye(4), torch.eye(4))

        class Full:
            def write(self, _):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer, "_streams", [Full(), Full()])
        with pytest.raises(OSError, match=r"No space left on device.*storage_directory") as caught:
            writer.append(torch.eye(4), torch.eye(4))
        assert caught.value.errno == errno.ENOSPC
        assert row_names(tmp_path) == []

    def test_a_file_that_is_none(self, tmp_path):
        for content in (b"", b"\x93NUMPY\x01\x00", b"x" * 300):
            (tmp_path / "rows.npy").write_bytes(content)
            with pytest.raises(RowFileError, match="cannot be read"):
                RowFile(tmp_path / "rows.npy")


class TestRefused:
    def test_without_a_directory(self):
        with pytest.raises(ValueError, match="`directory` has to name a directory"):
            KnowledgeBase.from_embeddings(torch.eye(3), torch.eye(3), num_prototypes=1, storage="memmap")

    def test_joint_clusters(self, tmp_path):
        with pytest.raises(ValueError, match=r'another than "joint"'):
            make(tmp_path, prototype_pairing="joint")

    def test_broken_rows(self, tmp_path):
        audio = directions(30, 4, 0)
        audio[[3, 9]] = torch.nan
        with pytest.raises(ValueError, match=r"2 of 30 source rows contain NaN or Inf \(rows 3, 9\)"):
            KnowledgeBase.from_embeddings(
                audio, directions(30, 4, 1), num_prototypes=1, storage="memmap", directory=tmp_path
            )

    def test_sending_it_away(self, tmp_path):
        with pytest.raises(TypeError, match="cannot be sent"):
            make(tmp_path).fine.__reduce__()


def look_up_sharded(folder: str, kind: str) -> tuple:
    audio, text, ids = source(40, captions=2)
    shard = shard_of(40, kind)
    own = shard.global_rows()
    base = KnowledgeBase.from_embeddings(
        audio[own],
        text[own],
        ids=[ids[row] for row in own.tolist()],
        num_prototypes=4,
        storage="memmap",
        directory=folder,
        placement="sharded",
        shard=shard,
    )
    start = 3 * shard.ranks.rank
    found = base.lookup(audio[start : start + 3], text[start : start + 3], 4)["fine"]
    clips = base.find_clips(base.ids[:5])
    path = Path(folder) / "kept" / "base.safetensors"
    base.save(path)
    shard.ranks.all_gather_object(None)
    again = KnowledgeBase.load(path, ranks=shard.ranks, directory=folder)
    return (
        found.audio_rows,
        found.text_by_audio,
        clips.audio,
        base.fingerprint,
        again.fingerprint,
        # Shards of a snapshot are interleaved again.
        base.fine.drift_from((again if kind == "interleaved" else base).fine, torch.arange(5)),
        len(base.fine.local),
    )


@pytest.mark.parametrize("kind", ["interleaved", "contiguous"])
def test_two_ranks_have_a_shard_each(tmp_path, kind):
    audio, text, ids = source(40, captions=2)
    expected = KnowledgeBase.from_embeddings(
        audio, text, ids=ids, num_prototypes=4, storage="float16", index="exact"
    )
    results = on_ranks(2, look_up_sharded, str(tmp_path), kind)
    for rank, (rows, vectors, clips, fingerprint, again, drift, count) in enumerate(results):
        part = slice(3 * rank, 3 * rank + 3)
        wanted = expected.lookup(audio[part], text[part], 4)["fine"]
        assert torch.equal(rows, wanted.audio_rows)
        assert torch.equal(vectors, wanted.text_by_audio)
        torch.testing.assert_close(clips, expected.find_clips(expected.ids[:5]).audio, atol=1e-6, rtol=0)
        assert fingerprint == again == results[0][3]
        assert count < 40
        assert [float(value) for value in drift] == pytest.approx([0, 0], abs=1e-6)
    # One process alone takes the snapshot of two.
    alone = KnowledgeBase.load(tmp_path / "kept" / "base.safetensors", directory=tmp_path)
    assert alone.fingerprint == results[0][3]
    assert torch.equal(alone.fine.audio, expected.fine.audio)


def look_up_one_pair(folder: str) -> tuple[torch.Tensor, str, str]:
    shard = RowShard.interleaved(1, Ranks.current())
    own = torch.eye(4)[:1][shard.global_rows()]
    base = KnowledgeBase.from_embeddings(
        own, own, num_prototypes=1, storage="memmap", directory=folder, placement="sharded", shard=shard
    )
    path = Path(folder) / "kept" / "base.safetensors"
    base.save(path)
    shard.ranks.all_gather_object(None)
    again = KnowledgeBase.load(path, ranks=shard.ranks, directory=folder)
    return base.lookup(torch.eye(4), torch.eye(4), 1)["fine"].audio_rows, base.fingerprint, again.fingerprint


def test_a_rank_without_pairs(tmp_path):
    for rows, fingerprint, again in on_ranks(2, look_up_one_pair, str(tmp_path)):
        assert rows.tolist() == [[0]] * 4
        assert fingerprint == again
    alone = KnowledgeBase.load(tmp_path / "kept" / "base.safetensors", directory=tmp_path)
    assert alone.fingerprint == fingerprint


def replace_beside_an_empty_shard(folder: str) -> tuple:
    """A contiguous shard, as of a stream, of which the last rank has nothing."""
    shard = RowShard.contiguous([3, 2, 0], Ranks.current())
    audio, text, _ = source(5)
    own = shard.global_rows()
    base = KnowledgeBase.from_embeddings(
        audio[own],
        text[own],
        num_prototypes=2,
        storage="memmap",
        directory=folder,
        placement="sharded",
        shard=shard,
    )
    base.save(Path(folder) / "kept" / "base.safetensors")  # so that the rows are copied before they change
    base.replace_rows(torch.tensor([4]), audio[:1], text[:1])
    return base.width, base.coarse.audio, base.lookup(audio, text, 2)["fine"].audio_rows


def test_prototypes_and_changes_beside_a_rank_without_pairs(tmp_path):
    audio, text, _ = source(5)
    expected = KnowledgeBase.from_embeddings(audio, text, num_prototypes=2, storage="float16", index="exact")
    prototypes = expected.coarse.audio.float()
    expected.replace_rows(torch.tensor([4]), audio[:1], text[:1])
    rows = expected.lookup(audio, text, 2)["fine"].audio_rows
    for width, coarse, found in on_ranks(3, replace_beside_an_empty_shard, str(tmp_path)):
        assert width == audio.shape[1]
        torch.testing.assert_close(coarse.float(), prototypes, atol=2e-3, rtol=0)
        assert torch.equal(found, rows)


def test_few_rows_are_searched_by_reading_all(tmp_path):
    base = make(tmp_path)
    assert isinstance(base.fine.search_audio, FileSearch)
    assert base.fine.search_audio.kind == "exact"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_queries_on_a_gpu(tmp_path, device):
    """Rows stay in files on the CPU; K-means, queries and results are on the GPU."""
    audio, text = directions(ROWS, WIDTH, 0), directions(ROWS, WIDTH, 1)
    base = KnowledgeBase.from_embeddings(
        audio.to(device), text.to(device), num_prototypes=7, storage="memmap", directory=tmp_path
    )
    expected = make(tmp_path, ids=None)
    found = base.lookup(*(side.to(device) for side in queries()), K)
    assert found["fine"].audio_rows.is_cuda
    assert found["coarse"].text_by_audio.is_cuda
    wanted = expected.lookup(*queries(), K)
    assert torch.equal(found["fine"].audio_rows.cpu(), wanted["fine"].audio_rows)
    assert torch.equal(found["fine"].text_by_text.cpu(), wanted["fine"].text_by_text)
    assert base.find_clips(torch.tensor([3])).audio.is_cuda
