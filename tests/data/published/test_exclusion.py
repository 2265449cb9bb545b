"""Exclusion lists, in every form in which people have them."""

import json

import pytest

from ask_lightning.data import Clip
from ask_lightning.data.published.exclusion import exclude_clips, read_ids

CLIPS = [
    Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U", aliases=("audiocap:97151",)),
    Clip("freesound:180913", ("a ringtone", "a phone"), "Rain 1.wav", aliases=("file:rain 1",)),
    Clip("soundbible:2219", ("a plane",), "2219"),
]


def names(clips):
    return [clip.key.partition(":")[0] for clip in clips]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "YvfY_TJq7n_U.wav\n\n180913\n"),
        ("a.txt", "vfY_TJq7n_U\r\nRain_1.wav\r\n"),
        ("a.txt", "youtube:vfY_TJq7n_U\nfreesound:180913"),
        ("a.json", ["97151", "rain 1"]),
        ("a.json", {"AudioSet": ["YvfY_TJq7n_U.wav"], "FreeSound": ["180913", "2219"]}),
        ("a.csv", "index,id\n0,vfY_TJq7n_U\n1,180913\n"),
        ("a.csv", "vfY_TJq7n_U\n180913\n"),
    ],
)
def test_lists_in_files(write, name, content):
    assert names(exclude_clips(CLIPS, write(name, content), "train")) == ["soundbible"]


def test_a_list_in_memory():
    assert names(exclude_clips(CLIPS, ["YvfY_TJq7n_U.flac", "2219"], "train")) == ["freesound"]


def test_a_number_of_one_collection_is_not_that_of_another(write):
    path = write("a.json", {"FreeSound": ["2219", "180913"]})
    assert names(exclude_clips(CLIPS, path, "train")) == ["youtube", "soundbible"]


def test_a_list_for_another_dataset_is_warned_about():
    with pytest.warns(UserWarning, match="train: none of the 1 ids of the exclusion list is there"):
        assert exclude_clips(CLIPS, ["b0RFKhbpFJA"], "train") == CLIPS


def test_everything_excluded():
    with pytest.raises(ValueError, match="train: all 3 clips are on the exclusion list"):
        exclude_clips(CLIPS, [clip.key for clip in CLIPS], "train")


def test_what_is_no_list(write, tmp_path):
    with pytest.raises(ValueError, match=r"has to be a list of ids, or an object of lists"):
        read_ids(write("a.json", {"AudioSet": "a"}))
    with pytest.raises(FileNotFoundError, match=r"There is no file at .*none"):
        read_ids(tmp_path / "none.txt")
