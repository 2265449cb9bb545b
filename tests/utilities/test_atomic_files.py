"""Files are there as a whole or not at all."""

import multiprocessing

import pytest

import ask_lightning.utilities.atomic_files
from ask_lightning.utilities.atomic_files import atomic_write


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
    write(path, b"new")
    assert path.read_bytes() == b"new"
    hidden, shown = names(tmp_path)
    assert shown == "a.bin"
    assert hidden.startswith(".a.bin.")
    assert hidden.endswith(ask_lightning.utilities.atomic_files.TEMPORARY)
