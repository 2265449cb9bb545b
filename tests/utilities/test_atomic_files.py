"""Files are there as a whole or not at all."""

import errno
import multiprocessing
import os
import time
from uuid import uuid4

import filelock
import pytest
import torch
from safetensors.torch import save_file

from ask_lightning.utilities.atomic_files import _MACHINE, atomic_write, remove_abandoned
from ask_lightning.utilities.file_lock import file_lock


def write(path, content):
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("flush", [True, False])
def test_written_and_replaced(tmp_path, flush):
    path = tmp_path / "new" / "folder" / "a.bin"
    for content in (b"first", b"", b"second"):
        with atomic_write(path, flush=flush) as temporary:
            assert not temporary.exists()
            temporary.write_bytes(content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("begun", [True, False])
def test_an_error_leaves_what_was_there(tmp_path, error, begun):
    path = tmp_path / "a.bin"
    write(path, b"old")

    def interrupted():
        with atomic_write(path) as temporary:
            if begun:
                temporary.write_bytes(b"half of the n")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.bin", flush=False):
        pass
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as first:
        first.write_bytes(b"first")
        write(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_of_the_name_is_in_the_way(tmp_path):
    (tmp_path / "a.bin" / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "a.bin", b"content")
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.ones(1)}, temporary)
        with atomic_write(tmp_path / "b") as temporary:
            temporary.mkdir()
            save_file({"a": torch.ones(1)}, temporary / "b.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "b" / "b.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("is_full", [True, False])
def test_the_error_of_a_full_disk_names_the_file(tmp_path, is_full):
    given = (28, "No space left on device") if is_full else ("something else",)
    with pytest.raises(OSError, match=r"No space|else") as caught, atomic_write(tmp_path / "a.bin"):
        raise OSError(*given)
    assert ("a.bin" in str(caught.value)) == is_full


def test_a_folder_is_there_as_a_whole(tmp_path):
    (tmp_path / "a").mkdir()
    with atomic_write(tmp_path / "a") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "b.bin").write_bytes(b"whole")
        assert list((tmp_path / "a").iterdir()) == []
    assert (tmp_path / "a" / "inner" / "b.bin").read_bytes() == b"whole"

    def interrupted():
        with atomic_write(tmp_path / "c") as temporary:
            (temporary / "inner").mkdir(parents=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["a"]


def killed_writer(path, machine=None):
    """What a writer of a file would leave if it were killed now; of another machine, if one is given."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        parts = temporary.name.rpartition(".")[0].rpartition(".")
        token = (machine or parts[2][:8]) + 32 * "0"
        left = [path.with_name(f"{parts[0]}.{token}.{ending}") for ending in ("tmp", "lock")]
        for file in left:
            file.write_bytes(b"half")
    path.unlink(missing_ok=True)
    return left


def kept(files):
    return [file.exists() for file in files]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    left, of_another = killed_writer(tmp_path / "a.bin"), killed_writer(tmp_path / "b.bin")
    mine = tmp_path / ".a.bin.notes.tmp", tmp_path / ".a.bin.notes.lock", tmp_path / ".a.bin.lock"
    for file in mine:
        file.touch()
    with atomic_write(tmp_path / "a.bin") as living:
        living.write_bytes(b"first")
        write(tmp_path / "a.bin", b"second")
        remove_abandoned(tmp_path, "a*")
        assert living.exists()
    assert kept(left) == [False, False]
    assert kept(of_another) == [True, True]
    assert all(kept(mine))
    remove_abandoned(tmp_path)
    assert kept(of_another) == [False, False]
    assert names(tmp_path) == [".a.bin.lock", ".a.bin.notes.lock", ".a.bin.notes.tmp", "a.bin"]


def test_writers_of_other_machines_are_left_alone_for_an_hour(tmp_path):
    left = killed_writer(tmp_path / "a.bin", machine="01234567")
    remove_abandoned(tmp_path)
    assert kept(left) == [True, True]
    os.utime(left[1], (time.time() - 7200,) * 2)
    remove_abandoned(tmp_path)
    assert kept(left) == [False, False]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    left = killed_writer(tmp_path / "a.bin")
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    write(tmp_path / "a.bin", b"written")
    assert left[0].exists()
    assert (tmp_path / "a.bin").read_bytes() == b"written"


def half_written(path, begun):
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        begun.set()
        multiprocessing.Event().wait()


@pytest.mark.slow
def test_a_killed_writer_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    write(path, b"old")
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    writer = context.Process(target=half_written, args=(path, begun))
    writer.start()
    assert begun.wait(60)
    writer.kill()
    writer.join()
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 3
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_a_lock_that_is_taken_for_abandoned_while_it_is_made(tmp_path, monkeypatch):
    """By another process, which looks for what killed writers have left."""
    tokens = [uuid4(), uuid4()]
    lock = tmp_path / f".a.{_MACHINE}{tokens[0].hex}.lock"
    monkeypatch.setattr("ask_lightning.utilities.atomic_files.uuid4", iter(tokens).__next__)
    with file_lock(lock), atomic_write(tmp_path / "a") as temporary:
        assert temporary.name == f".a.{_MACHINE}{tokens[1].hex}.tmp"
        temporary.write_text("whole")
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_locked_is_an_error_of_the_file(tmp_path, monkeypatch):
    def refuse(path, *, wait):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("ask_lightning.utilities.atomic_files.file_lock", refuse)
    with pytest.raises(PermissionError) as caught:
        write(tmp_path / "a", b"")
    assert caught.value.filename == str(tmp_path / "a")


def _look_for_abandoned(folder, stop):
    while not stop.is_set():
        remove_abandoned(folder)


def test_a_writer_beside_one_that_looks_for_abandoned_files(tmp_path):
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    looking = context.Process(target=_look_for_abandoned, args=(tmp_path, stop))
    looking.start()
    try:
        for number in range(300):
            with atomic_write(tmp_path / "a") as temporary:
                temporary.write_text(str(number))
            assert (tmp_path / "a").read_text() == str(number)
    finally:
        stop.set()
        looking.join()
