"""The lock of a file: others wait for it, and file systems without locks go on."""

import errno
import threading

import filelock
import pytest

from ask_lightning.utilities.file_lock import LockHeldError, file_lock


def test_another_one_waits(tmp_path):
    path = tmp_path / "a.lock"
    events = []

    def second():
        with file_lock(path):
            events.append("second")

    waiting = threading.Thread(target=second)
    with file_lock(path):
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        events.append("first")
    waiting.join(10)
    assert events == ["first", "second"]
    assert list(tmp_path.iterdir()) == []


def test_it_is_released_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="broken"), file_lock(tmp_path / "a.lock"):
        raise ValueError("broken")
    with file_lock(tmp_path / "a.lock"):
        pass


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOTSUP, "Operation not supported")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    for wait in (True, False):
        with file_lock(tmp_path / "a.lock", wait=wait) as is_locked:
            assert not is_locked


def test_a_held_lock_is_not_waited_for(tmp_path):
    with file_lock(tmp_path / "a.lock") as is_locked:
        assert is_locked
        with pytest.raises(LockHeldError, match=r"a\.lock"), file_lock(tmp_path / "a.lock", wait=False):
            pass


def test_a_path_that_cannot_be(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="a"), file_lock(tmp_path / "a" / "a.lock"):
        pass
