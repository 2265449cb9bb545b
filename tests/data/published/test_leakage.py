"""Evaluation clips in a knowledge source are found by id, title and caption."""

import pytest

from ask_lightning.data import Clip, check_leakage, find_leakage, leaked_ids

VAL = [
    Clip("youtube:vfY_TJq7n_U", ("Rustling occurs, ducks quack.", "Ducks"), "vfY_TJq7n_U", ("audiocap:5",))
]
TEST = [Clip("file:rain on a roof", ("Rain falls.",), "Rain on a roof.wav")]
KNOWN = [Clip("freesound:7", ("Rain falls.",), "Rain on a roof.wav", ("file:rain on a roof",))]
WAVCAPS = [
    Clip("youtube:vfY_TJq7n_U", ("Birds.",), "YvfY_TJq7n_U.wav"),
    Clip("youtube:b0RFKhbpFJA", ("Wind.",), "Yb0RFKhbpFJA.wav"),
    Clip("freesound:7", ("Water.",), "7", ("file:rain on a roof",)),
    Clip("bbc:1", ("rustling occurs  ducks quack",), "1"),
    Clip("soundbible:5", ("A plane.",), "5"),
]


def test_by_id_by_title_and_by_the_words_of_a_caption():
    leakage = find_leakage(WAVCAPS, VAL, TEST)
    assert leakage.by_id == ["youtube:vfY_TJq7n_U"]
    assert leakage.by_title == ["freesound:7"]
    assert leakage.by_caption == ["bbc:1"]
    assert leakage.num_clips == 5


def test_sounds_that_are_known_are_compared_by_id():
    assert find_leakage(WAVCAPS, KNOWN).by_id == ["freesound:7"]


def test_equal_titles_of_sounds_with_other_ids_are_chance():
    other = Clip("freesound:8", ("Water.",), "8", ("file:rain on a roof",))
    assert not find_leakage([other], KNOWN)
    assert find_leakage([other], TEST).by_title == ["freesound:8"]


def test_a_source_without_ids_is_compared_by_title():
    own = Clip("file:rain on a roof", ("Water.",), "rain on a roof.flac")
    assert find_leakage([own], KNOWN).by_title == ["file:rain on a roof"]
    assert find_leakage([own], TEST).by_title == ["file:rain on a roof"]
    assert not find_leakage([own], VAL)


def test_stretches_of_one_video_are_one_recording():
    part = Clip("youtube:b0RFKhbpFJA@30", ("x",), "b0RFKhbpFJA", ("youtube:b0RFKhbpFJA",), start=30)
    assert find_leakage(WAVCAPS, [part]).by_id == ["youtube:b0RFKhbpFJA"]
    assert find_leakage([part], [WAVCAPS[1]]).by_id == ["youtube:b0RFKhbpFJA@30"]


def test_what_to_exclude_keeps_the_order_and_leaves_captions_to_the_user():
    assert leaked_ids(WAVCAPS, VAL, TEST) == ["youtube:vfY_TJq7n_U", "freesound:7"]
    assert leaked_ids(WAVCAPS, VAL, TEST, by=["caption"]) == ["bbc:1"]
    assert leaked_ids(WAVCAPS, VAL, TEST, by=["id"]) == ["youtube:vfY_TJq7n_U"]
    with pytest.raises(
        ValueError, match=r"`by` has to be one of .*'id', 'title', 'caption'.* but got 'name'"
    ):
        leaked_ids(WAVCAPS, VAL, by=["name"])


def test_the_warning_has_counts_and_the_way_out():
    with pytest.warns(UserWarning, match="shares clips with the evaluation sets") as caught:
        check_leakage(WAVCAPS, VAL, TEST, name="WavCaps")
    message = str(caught[0].message)
    assert message.startswith("WavCaps shares clips")
    assert (
        "of 5 clips 1 by id (youtube:vfY_TJq7n_U), 1 by title (freesound:7), 1 by caption (bbc:1)" in message
    )
    assert "`exclude=leaked_ids(source, *evaluation)`" in message


def test_nothing_shared_is_silent(recwarn):
    assert not check_leakage(WAVCAPS[-1:], VAL, TEST)
    assert not recwarn.list


def test_what_has_no_clips():
    with pytest.raises(
        TypeError, match="has to be a dataset with `clips` or a sequence of clips, but got list"
    ):
        find_leakage([1], VAL)
