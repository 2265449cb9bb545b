"""What a checksum of a file notices, of small files and of large ones."""

import os

import pytest

from ask_lightning.utilities import file_checksum
from ask_lightning.utilities.file_checksum import sampled_checksum


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(file_checksum, "_BLOCK", 16)
    monkeypatch.setattr(file_checksum, "_BLOCKS_READ", 8)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 128])
def test_each_byte_of_a_small_file_counts(size, tmp_path):
    path, content = tmp_path / "file", bytearray(os.urandom(size))
    path.write_bytes(content)
    whole = sampled_checksum(path)
    for place in range(size):
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert sampled_checksum(path) != whole
    path.write_bytes(content)
    assert sampled_checksum(path) == whole


@pytest.mark.parametrize("size", [129, 1000, 4096, 9999])
def test_a_stretch_of_a_large_file_and_both_ends_count(size, tmp_path):
    path, content = tmp_path / "file", bytes(range(1, 256)) * 40
    path.write_bytes(content[:size])
    whole = sampled_checksum(path)
    stretch = 16 * (-(-size // 16) // 7 + 2)
    for start in [*range(0, size - stretch, 7), size - stretch]:
        changed = bytearray(content[:size])
        changed[start : start + stretch] = bytes(stretch)
        path.write_bytes(changed)
        assert sampled_checksum(path) != whole
    for place in (0, size - 1):
        changed = bytearray(content[:size])
        changed[place] ^= 1
        path.write_bytes(changed)
        assert sampled_checksum(path) != whole


def test_an_empty_file_and_lengths(tmp_path):
    empty, zeros, more = (tmp_path / name for name in "abc")
    empty.touch()
    zeros.write_bytes(bytes(160))
    more.write_bytes(bytes(161))
    assert len({sampled_checksum(path) for path in (empty, zeros, more)}) == 3
