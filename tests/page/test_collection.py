"""What a query finds, and what of it is shown."""

from dataclasses import replace
from pathlib import Path

import pytest

from ask_lightning.data import AudioFileError
from ask_lightning.page.clip_map import map_html, place_points
from ask_lightning.page.collection import answer_query, contains, filter_matches
from tests.page.clips import CALIBRATION, TOKENS, make_collection, write_sounds


def test_a_text_ranks_all_clips(tmp_path):
    collection = make_collection([None] * 4, CALIBRATION)
    answer = answer_query(collection, "high tone")
    assert [match.row for match in answer.matches] == [1, 0, 2, 3]
    assert (answer.matches[0].score, answer.refinement) == (1.0, None)
    answer = answer_query(collection, "high tone", refined=True)
    assert (answer.matches[0].score, answer.matches[0].cosine) == (0.5, 1.0)
    assert answer.refinement is CALIBRATION
    plain = make_collection([None] * 4)
    assert answer_query(plain, "high tone", refined=True).refinement is None


def test_words_are_told_to_a_search_that_does_not_find_all():
    for refinement, refined, rows in (
        (TOKENS, True, [0]),
        (TOKENS, False, [1, 0, 2, 3]),
        (CALIBRATION, True, [1, 0, 2, 3]),
    ):
        collection = make_collection([None] * 4, refinement)
        answer = answer_query(collection, "high tone", refined, "humming")
        assert [match.row for match in answer.matches] == rows


def test_words_are_told_to_a_collection_that_finds_the_best_alone():
    for finds_all, rows in ((True, [1, 0, 2, 3]), (False, [0])):
        collection = replace(make_collection([None] * 4), finds_all=finds_all)
        answer = answer_query(collection, "high tone", words="humming")
        assert [match.row for match in answer.matches] == rows
        assert answer.finds_all is finds_all


def test_a_missing_package_is_a_problem():
    collection = make_collection([None] * 4)

    def lacks(path: Path, refined: bool, words: str):
        raise ImportError("PyAV is missing")

    object.__setattr__(collection, "by_sound", lacks)
    assert answer_query(collection, Path("a.m4a")).problem == "PyAV is missing"


def test_a_sound_finds_each_clip_once_by_its_best_caption(tmp_path):
    (low, *_) = write_sounds(tmp_path)
    answer = answer_query(make_collection([None] * 4), low)
    assert [match.row for match in answer.matches] == [3, 2, 1, 0]
    assert answer.matches[-1].caption == "humming"


@pytest.mark.parametrize("query", [None, "", "  "])
def test_nothing_to_ask_is_said(query):
    answer = answer_query(make_collection([None] * 4), query)
    assert answer.problem.startswith("There is nothing to search for.")
    assert not answer.matches


def test_problems_name_the_file_that_the_user_gave(monkeypatch):
    collection = make_collection([None] * 4)
    assert answer_query(collection, "?!").problem == "No words."

    def broken(path: Path, refined: bool, words: str):
        raise AudioFileError(f"{path}: the file is empty.")

    object.__setattr__(collection, "by_sound", broken)
    assert answer_query(collection, Path("/uploads/1f/rain.wav")).problem == "rain.wav: the file is empty."


def test_filters_go_together():
    collection = make_collection([Path("a/Low.wav"), None, None, None])
    matches = answer_query(collection, "high tone").matches

    def rows(**filters):
        return [match.row for match in filter_matches(collection, matches, **filters)]

    assert rows() == [1, 0, 2, 3]
    assert rows(count=2) == [1, 0]
    assert rows(lowest=0.5) == [1, 0]
    assert rows(words=" TONE ", count=1) == [1]
    assert rows(words="humming") == [0]
    assert rows(words="low.WAV") == [0]
    assert rows(words="tone", lowest=0.6) == [1]
    assert contains(collection, 3, "") is True


def test_an_accent_is_found_however_it_is_written():
    collection = make_collection([Path("Cafe\u0301.wav"), None, None, None])
    assert contains(collection, 0, "café")
    assert contains(collection, 0, "CAFE\u0301")
    assert 'data-texts="low\ncafé.wav' in map_html(collection, [0], place_points(collection.embeddings[:1]))


def test_words_are_not_found_across_the_end_of_a_text():
    collection = make_collection([Path("a/Low.wav"), None, None, None])
    assert collection.texts_of(0) == ["low", "Low.wav", "a low tone", "humming"]
    assert not contains(collection, 0, "tone humming")
    html = map_html(collection, [0], place_points(collection.embeddings[:1]))
    assert 'data-texts="low\nlow.wav\na low tone\nhumming"' in html
