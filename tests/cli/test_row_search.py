"""The best rows for a query: all compared, by an index, calibrated, and filtered."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from ask_lightning.cli import row_search
from ask_lightning.cli.row_search import best_rows
from ask_lightning.cli.word_filter import WordFilter
from ask_lightning.knowledge.faiss_search import FaissSearch
from tests.helpers.encoded_files import random_pairs

SIDES = ("audio", "text")


def expected_rows(pairs, side, query, count, passes=lambda row: True):
    """All rows sorted by their scores in float64, of equal ones the first first."""
    cosines = getattr(pairs, side).double() @ query.double()
    scores = cosines
    if pairs.calibration is not None:
        bias = getattr(pairs.calibration, f"{side}_bias").double()
        hubs = getattr(pairs.calibration, f"{side}_hubs")
        if hubs is None or bool(hubs[cosines.argmax()]):
            scores = cosines - bias
    order = [row for row in scores.argsort(descending=True, stable=True).tolist() if passes(row)][:count]
    return order, scores[order], cosines[order]


@pytest.fixture(
    params=[{}, {"calibrated": True}, {"calibrated": True, "gate": True}], ids=["raw", "bias", "gate"]
)
def pairs(request):
    return random_pairs(**request.param)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("index", [None, "Flat", "IVF8,SQ8;nprobe=8", "HNSW16;efSearch=600"])
def test_rows_are_those_of_a_full_sort(pairs, side, index):
    search = None if index is None else FaissSearch(getattr(pairs, side), index)
    queries = getattr(random_pairs(60, seed=1), "text" if side == "audio" else "audio")[:12]
    for query in queries:
        for count in (1, 10, 10_000):
            found = best_rows(pairs, side, query, count, index=search)
            rows, scores, cosines = expected_rows(pairs, side, query, count)
            assert found.rows.tolist() == rows
            torch.testing.assert_close(found.scores.double(), scores, atol=1e-6, rtol=0)
            torch.testing.assert_close(found.cosines.double(), cosines, atol=1e-6, rtol=0)


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("examined", [20, 10_000])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("words", ["bell", "folder/299.WAV", "nothing has this"])
def test_filters_reach_beyond_the_first_candidates(pairs, by_index, examined, side, words, monkeypatch):
    monkeypatch.setattr(row_search, "_MOST_EXAMINED", examined)
    search = FaissSearch(getattr(pairs, side), "IVF8,SQ8;nprobe=8") if by_index else None
    query = pairs.text[0]
    passes = WordFilter(pairs, side, words)
    found = best_rows(pairs, side, query, 5, index=search, passes=passes)
    assert found.rows.tolist() == expected_rows(pairs, side, query, 5, passes)[0]
    assert len(found.rows) == {"bell": 5, "folder/299.WAV": 1 if side == "audio" else 2}.get(words, 0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("words", [" BELL", "bell 10,", "folder/12", "7.wav", "nothing has this"])
def test_all_rows_that_pass_a_filter_are_those_that_pass_one_by_one(side, words):
    pairs = random_pairs()
    passes = WordFilter(pairs, side, words)
    rows = range(len(getattr(pairs, side)))
    assert passes.rows().tolist() == [row for row in rows if passes(row)]
    whole = WordFilter(pairs, side, words, whole_clips=True)
    clips = {pairs.clip_and_captions(side, row)[0] for row in rows if passes(row)}
    assert whole.rows().tolist() == [row for row in rows if whole(row)]
    assert whole.rows().tolist() == [row for row in rows if pairs.clip_and_captions(side, row)[0] in clips]
    without = replace(pairs, files=())
    passes = WordFilter(without, side, words)
    assert passes.rows().tolist() == [row for row in rows if passes(row)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_rows_keep_their_order(dtype):
    pairs = random_pairs()
    # So many and so wide that a matrix product would round equal rows to unequal scores.
    vectors = normalize(torch.randn(3, 37, generator=torch.Generator().manual_seed(0)))
    pairs.audio = vectors[torch.arange(1001) % 3].to(dtype)
    for search in (None, FaissSearch(pairs.audio, "Flat")):
        found = best_rows(pairs, "audio", vectors[1], 1000, index=search)
        assert found.rows[:334].tolist() == list(range(1, 1001, 3))
        assert len(found.scores.unique()) == 3


def test_scores_are_those_of_a_row_however_it_is_found():
    pairs = random_pairs()
    pairs.audio = normalize(torch.randn(1001, 37, generator=torch.Generator().manual_seed(0)))
    query = pairs.audio[-1]
    whole = best_rows(pairs, "audio", query, 20)
    by_index = best_rows(pairs, "audio", query, 20, index=FaissSearch(pairs.audio, "Flat"))
    assert all(torch.equal(one, two) for one, two in zip(whole, by_index, strict=True))


def test_rows_in_half_precision():
    pairs = random_pairs()
    pairs.audio = pairs.audio.half()
    for search in (None, FaissSearch(pairs.audio, "IVF4,SQ8;nprobe=4")):
        found = best_rows(pairs, "audio", pairs.text[3], 10, index=search)
        assert found.scores.dtype == torch.float32
        assert found.rows.tolist() == expected_rows(pairs, "audio", pairs.text[3], 10)[0]
