"""Rows of the paper's tables: which scores, in percent, and what the files hold."""

import csv
import json

from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.metrics.table import (
    COLUMNS,
    RECALLS,
    heading,
    mean_recall,
    percentages,
    score_table,
    write_scores,
)

ROWS = {"AudioCaps": {"a2t/recall_at_1": 25.0, "t2a/map_at_10": 12.3456}, "Clotho": {"a2t/recall_at_1": 0.0}}


def test_the_columns_are_scores_of_the_metric():
    assert set(COLUMNS) < set(AudioTextRetrieval().score_names)
    assert list(COLUMNS.values())[:4] == ["A2T R@1", "A2T R@5", "A2T R@10", "A2T mAP@10"]
    assert heading("t2a/recall_at_10") == "T2A R@10"


def test_percentages_are_those_of_one_split():
    logged = {"val/a2t/recall_at_1": 0.5, "test/a2t/recall_at_1": 0.123456, "test/a2t/median_rank": 3.0}
    assert percentages(logged, "test/") == {"a2t/recall_at_1": 12.3456}
    assert percentages(logged, "train/") == {}


def test_a_score_that_is_missing_is_an_empty_cell():
    assert score_table(ROWS, "dataset") == (
        ["dataset", "A2T R@1", "T2A mAP@10"],
        [["AudioCaps", 25.0, 12.3456], ["Clotho", 0.0, ""]],
    )


def test_files_hold_all_columns(tmp_path):
    write_scores(tmp_path / "scores.csv", ROWS)
    with (tmp_path / "scores.csv").open(newline="") as file:
        audiocaps, clotho = csv.DictReader(file)
    assert list(audiocaps) == ["dataset", *COLUMNS]
    assert (audiocaps["t2a/map_at_10"], clotho["t2a/map_at_10"]) == ("12.3456", "")
    assert json.loads((tmp_path / "scores.json").read_text()) == ROWS


def test_mean_recall_of_what_was_measured():
    whole = {name: float(number) for number, name in enumerate(RECALLS)} | {"t2a/map_at_10": 9.0}
    assert mean_recall(whole) == 2.5
    assert mean_recall({"t2a/recall_at_1": 0.25, "t2a/median_rank": 7.0}) == 0.25
    assert mean_recall({"t2a/map_at_10": 0.5}) == 0.0
    assert mean_recall({"t2a/recall_at_1": 0.25, "a2t/recall_at_1": 0.75}, directions=["t2a"]) == 0.25
