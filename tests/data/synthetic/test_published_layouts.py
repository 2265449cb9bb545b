"""Synthetic copies of the published datasets."""

import pytest

from ask_lightning.data import (
    write_audiocaps,
    write_wavcaps,
)
from tests.helpers.published import SMALL


def test_writing_is_fast_and_the_same_each_time(written, tmp_path):
    again = write_audiocaps(tmp_path, **SMALL)
    for path in again.rglob("*.*"):
        assert path.read_bytes() == (written / "audiocaps" / path.relative_to(again)).read_bytes()
    other = write_audiocaps(tmp_path / "other", **SMALL, seed=1)
    assert (other / "val.csv").read_text() != (again / "val.csv").read_text()
    with pytest.raises(
        ValueError, match=r"`num_clips` has to be at least 4 and 4 × `overlap`, but got 3 and 1"
    ):
        write_wavcaps(tmp_path, num_clips=3)
