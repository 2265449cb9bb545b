"""The parsers on real annotation files, where `ASK_LIGHTNING_CAPTIONS` names a folder of them."""

import os
from pathlib import Path

import pytest

from ask_lightning.data import find_leakage, read_audiocaps, read_clotho, read_wavcaps
from ask_lightning.data.clips import count_captions

FOLDER = Path(os.environ.get("ASK_LIGHTNING_CAPTIONS", "none"))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="ASK_LIGHTNING_CAPTIONS names no folder")


@pytest.mark.parametrize(
    ("reader", "path", "clips", "captions"),
    [
        (read_audiocaps, "audiocaps/val.csv", 495, 2475),
        (read_clotho, "clotho/clotho_captions_validation.csv", 1045, 5225),
        (read_wavcaps, "wavcaps/sb_final.json", 1232, 1232),
    ],
)
def test_counts(reader, path, clips, captions, recwarn):
    read = reader(FOLDER / path)
    assert (len(read), count_captions(read)) == (clips, captions)
    assert len({clip.key for clip in read}) == clips
    assert not recwarn.list


def test_soundbible_shares_no_recording_with_the_validation_sets():
    wavcaps = read_wavcaps(FOLDER / "wavcaps/sb_final.json")
    audiocaps = read_audiocaps(FOLDER / "audiocaps/val.csv")
    clotho = read_clotho(FOLDER / "clotho/clotho_captions_validation.csv")
    leakage = find_leakage(wavcaps, audiocaps, clotho)
    assert leakage.by_id == leakage.by_title == []
