"""The parsers on real annotation files, where `ASK_LIGHTNING_CAPTIONS` names a folder of them."""

import os
from pathlib import Path

import pytest

from ask_lightning.data import find_leakage, read_audiocaps, read_clotho, read_wavcaps
from ask_lightning.data.clips import count_captions
from ask_lightning.data.published.exclusion import read_ids

FOLDER = Path(os.environ.get("ASK_LIGHTNING_CAPTIONS", "none"))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="ASK_LIGHTNING_CAPTIONS names no folder")


@pytest.mark.parametrize(
    ("reader", "path", "clips", "captions"),
    [
        (read_audiocaps, "audiocaps/val.csv", 495, 2475),
        (read_clotho, "clotho/clotho_captions_validation.csv", 1045, 5225),
        (read_wavcaps, "wavcaps/sb_final.json", 1232, 1232),
        (read_clotho, "wavcaps_repository/Clotho_val.json", 1045, 5225),
        (read_wavcaps, "wavcaps_repository/AudioCaps_val.json", 494, 2470),
        (read_wavcaps, "ml_clap/AudioCaps_test.json", 957, 4785),
        (read_audiocaps, "ml_act/AudioCaps_val.csv", 494, 2470),
        (read_clotho, "ml_act/Clotho_val.csv", 1045, 5225),
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


def test_the_ids_of_clotho_in_the_form_of_wavcaps():
    clips = read_clotho(FOLDER / "wavcaps_repository/Clotho_val.json")
    assert sum(clip.key.startswith("freesound:") for clip in clips) == 1039


def test_a_black_list_holds_the_clips_it_was_made_for():
    lists = read_ids(FOLDER / "wavcaps_repository/blacklist_exclude_test_ac.json")
    excluded = frozenset().union(*lists)
    clips = read_wavcaps(FOLDER / "wavcaps_repository/AudioCaps_val.json", "AudioCaps")
    assert all(clip.keys & excluded for clip in clips)
