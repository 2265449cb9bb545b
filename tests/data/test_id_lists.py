"""Exclusion lists and captions by id, in every form in which people have them."""

import json

import pytest

from ask_lightning.data import Clip
from ask_lightning.data.published.id_lists import enrich, read_ids, without

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
    assert names(without(CLIPS, write(name, content), "train")) == ["soundbible"]


def test_a_list_in_memory():
    assert names(without(CLIPS, ["YvfY_TJq7n_U.flac", "2219"], "train")) == ["freesound"]


def test_a_number_of_one_collection_is_not_that_of_another(write):
    path = write("a.json", {"FreeSound": ["2219", "180913"]})
    assert names(without(CLIPS, path, "train")) == ["youtube", "soundbible"]


def test_a_list_for_another_dataset_is_warned_about():
    with pytest.warns(UserWarning, match="train: none of the 1 ids of the exclusion list is there"):
        assert without(CLIPS, ["b0RFKhbpFJA"], "train") == CLIPS


def test_everything_excluded():
    with pytest.raises(ValueError, match="train: all 3 clips are on the exclusion list"):
        without(CLIPS, [clip.key for clip in CLIPS], "train")


def test_what_is_no_list(write, tmp_path):
    with pytest.raises(ValueError, match=r"has to be a list of ids, or an object of lists"):
        read_ids(write("a.json", {"AudioSet": "a"}))
    with pytest.raises(FileNotFoundError, match=r"no table of captions at .*none"):
        read_ids(tmp_path / "none.txt")


ENRICHED = [
    ("a.csv", "youtube_id,caption\nvfY_TJq7n_U,new\n"),
    ("a.csv", "audiocap_id,caption\n97151,new\n"),
    ("a.csv", "file_name,caption\nYvfY_TJq7n_U.wav,new\n"),
    ("a.json", {"vfY_TJq7n_U": "new"}),
    ("a.json", {"YvfY_TJq7n_U.wav": ["new"]}),
    ("a.json", [{"id": "vfY_TJq7n_U", "caption": "new"}]),
    ("a.json", {"num_captions_per_audio": 1, "data": [{"audiocap_id": 97151, "caption": "new"}]}),
]


@pytest.mark.parametrize(("name", "content"), ENRICHED)
def test_captions_replace_or_are_added(write, name, content):
    path = write(name, content)
    with pytest.warns(
        UserWarning, match="captions for 1 of 3 clips of train; 2 keep their own alone, and 0 ids"
    ):
        replaced = enrich(CLIPS, path, "replace", "train")
    with pytest.warns(UserWarning, match="captions for 1 of 3 clips"):
        added = enrich(CLIPS, path, "add", "train")
    assert [clip.captions for clip in replaced] == [("new",), *(clip.captions for clip in CLIPS[1:])]
    assert added[0].captions == ("ducks", "new")
    assert [clip.keys for clip in added] == [clip.keys for clip in CLIPS]


def test_several_captions_of_a_clip(write):
    table = "file_name,caption_1,caption_2\nRain 1.wav,one,two\nRain 1.wav,three, \n"
    with pytest.warns(UserWarning, match="captions for 1 of 3 clips"):
        clips = enrich(CLIPS, write("a.csv", table), "replace", "train")
    assert clips[1].captions == ("one", "two", "three")


def test_ids_of_no_clip_are_named(write):
    content = {"vfY_TJq7n_U": "new", **{f"b0RFKhbpF{index:02d}": "x" for index in range(5)}}
    with pytest.warns(
        UserWarning, match=r"5 ids belong to no clip \(b0RFKhbpF00, b0RFKhbpF01, b0RFKhbpF02 and 2 m"
    ):
        enrich(CLIPS, write("a.json", content), "add", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            {"b0RFKhbpFJA": "x"},
            r"none of its 1 ids belongs to a clip of train .*like 'vfY_TJq7n_U' or 'yout",
        ),
        ("a.json", [{"title": "x"}], r"entry 0: it has to be an object with an 'id' and a 'caption'"),
        ("a.json", "text", r"not JSON"),
        (
            "a.csv",
            "title,caption\na,b\n",
            r"no column 'id'; it has \['title', 'caption'\]. It needs one of clip_id",
        ),
        ("a.csv", "id,text\na,b\n", r"no column 'caption'"),
        ("a.csv", "id;caption\na;b\n", r"look separated by ';'"),
    ],
)
def test_captions_that_cannot_be_used(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        enrich(CLIPS, write(name, content), "replace", "train")


def test_modes(write):
    with pytest.raises(ValueError, match="`enriched_mode` has to be 'replace' or 'add', but got 'both'"):
        enrich(CLIPS, write("a.json", {"vfY_TJq7n_U": "x"}), "both", "train")
