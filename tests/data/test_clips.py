"""Clips from rows: repeated ids, empty and very long captions."""

import json

import pytest

from ask_lightning.data import Clip, read_audiocaps, read_clotho, read_wavcaps
from tests.helpers.annotations import AUDIOCAPS, CLOTHO, wavcaps_json


def test_a_repeated_id_is_reported_and_its_captions_are_put_together(write):
    table = write("a.csv", CLOTHO + "a.wav,rain,wind\nb.wav,sea,sun\na.wav,rain,hail\n")
    with pytest.warns(UserWarning, match=r"1 rows repeat an id, .*: line 4 \('a.wav'\)"):
        clips = read_clotho(table)
    assert [clip.captions for clip in clips] == [("rain", "wind", "hail"), ("sea", "sun")]
    with pytest.warns(UserWarning, match=r"1 rows repeat an id"):
        clips = read_audiocaps(write("b.csv", AUDIOCAPS + "1,vfY_TJq7n_U,0,Ducks\n1,vfY_TJq7n_U,0,Ducks\n"))
    assert clips[0].captions == ("Ducks",)
    entries = [{"id": "1", "caption": caption} for caption in ("rain", "wind")]
    with pytest.warns(UserWarning, match=r"1 rows repeat an id.*entry 1 \('1'\)"):
        assert read_wavcaps(write("sb_final.json", wavcaps_json(*entries)))[0].captions == ("rain", "wind")


def test_a_caption_that_is_null_is_an_empty_one(tmp_path):
    path = tmp_path / "sb_final.json"
    entries = [
        {"id": "1", "caption": None},
        {"id": "2", "caption": "rain"},
        {"id": "3", "caption": [None, "a"]},
    ]
    path.write_text(json.dumps({"data": entries}))
    with pytest.warns(UserWarning, match="2 captions are empty and left out: entry 0, entry 2"):
        clips = read_wavcaps(path)
    assert [(clip.name, clip.captions) for clip in clips] == [("2", ("rain",)), ("3", ("a",))]


def test_an_empty_caption_is_left_out_and_a_clip_without_any_too(write):
    table = write("a.csv", AUDIOCAPS + "1,vfY_TJq7n_U,0, \n2,vfY_TJq7n_U,0,Ducks\n3,tdWhHV3X25Q,60,\n")
    with pytest.warns(UserWarning, match=r"2 captions are empty and left out: line 2, line 4"):
        clips = read_audiocaps(table)
    assert [clip.captions for clip in clips] == [("Ducks",)]


def test_a_caption_of_ten_thousand_words_is_kept_and_reported(write):
    caption = " ".join(["quack"] * 10_000)
    with pytest.warns(UserWarning, match=r"1 captions have more than 200 words .*line 2 \(10000 words\)"):
        clips = read_audiocaps(write("a.csv", AUDIOCAPS + f"1,vfY_TJq7n_U,0,{caption}\n"))
    assert clips[0].captions == (caption,)


def test_a_clip_prints_what_it_is():
    assert "youtube:b0RFKhbpFJA" in repr(Clip("youtube:b0RFKhbpFJA", ("wind",), "b0RFKhbpFJA"))
