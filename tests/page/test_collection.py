"""What a query finds, and what of it is shown."""

from pathlib import Path

import pytest

from ask_lightning.data import AudioFileError
from ask_lightning.page.collection import answer_query, contains, filter_matches
from tests.page.clips import make_collection, write_sounds


def test_a_text_ranks_all_clips(tmp_path):
    collection = make_collection([None] * 4, calibration="softmax")
    answer = answer_query(collection, "high tone")
    assert [match.row for match in answer.matches] == [1, 0, 2, 3]
    assert (answer.matches[0].score, answer.calibrated) == (1.0, False)
    answer = answer_query(collection, "high tone", calibrated=True)
    assert (answer.matches[0].score, answer.matches[0].cosine, answer.calibrated) == (0.5, 1.0, True)
    plain = make_collection([None] * 4)
    assert not answer_query(plain, "high tone", calibrated=True).calibrated


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

    def broken(path: Path, calibrated: bool):
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
