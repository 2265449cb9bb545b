"""Curves of a run, read from the file of Lightning's CSVLogger, and their picture."""

import csv

from ask_lightning.metrics.table import RECALLS
from ask_lightning.reproduce import Comparison, Metrics, Run, comparison_picture
from ask_lightning.reproduce.figures import _mean_curve, read_column

NAMES = ["epoch", "val/mean_recall", "ask/probe_rdm_audio", "ask/probe_rdm_text", "ask/factor_a2t"]


def write_metrics(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(rows)


def test_steps_of_an_epoch_are_averaged_and_gaps_left_out(tmp_path):
    rows = [
        {"epoch": 0, "ask/factor_a2t": 1.0},
        {"epoch": 0, "ask/factor_a2t": 2.0},
        {"epoch": 1, "val/mean_recall": 0.5},
        {"epoch": 2, "ask/factor_a2t": 3.0},
    ]
    write_metrics(tmp_path / "metrics.csv", rows)
    assert read_column(tmp_path / "metrics.csv", "ask/factor_a2t") == ([0, 2], [1.5, 3.0])
    assert read_column(tmp_path / "metrics.csv", "ask/probe_rdm_audio") == ([], [])


def make_run(folder, method, seed, values):
    """A finished run whose folder has one value of each named metric for each epoch."""
    run = folder / f"{method}-{seed}"
    run.mkdir()
    write_metrics(
        run / "metrics.csv",
        [
            {"epoch": epoch} | {name: column[epoch] for name, column in values.items()}
            for epoch in range(len(next(iter(values.values()))))
        ],
    )
    recalls = dict.fromkeys(RECALLS, 0.1 * (seed + 1))
    return Run(method, {"temperature": 0.1}, seed, "test", Metrics(*[recalls] * 4), folder=run)


def test_curves_are_means_over_seeds_and_sides_of_the_epochs_that_all_have(tmp_path):
    runs = [
        make_run(tmp_path, "ASK", 0, {"ask/probe_rdm_audio": [1, 2, 3], "ask/probe_rdm_text": [1, 2, 3]}),
        make_run(tmp_path, "ASK", 1, {"ask/probe_rdm_audio": [3, 6], "ask/probe_rdm_text": [5, 6]}),
    ]
    assert _mean_curve(runs, ("ask/probe_rdm_audio", "ask/probe_rdm_text")) == ([0, 1], [2.5, 4.0])
    assert _mean_curve(runs, ("val/mean_recall",)) == ([], [])


def test_the_picture_shows_a_baseline_without_what_only_ask_logs(tmp_path):
    recall = {"val/mean_recall": [0.1, 0.2, 0.3]}
    drift = {"ask/probe_rdm_audio": [0.1, 0.2, 0.3], "ask/probe_rdm_text": [0.1, 0.2, 0.3]}
    runs = tuple(
        make_run(tmp_path, method, seed, values)
        for method, values in (("NT-Xent", recall), ("ASK", recall | drift))
        for seed in (0, 1)
    )
    # ASK stands for a model with an interaction, which has no calibrated search.
    comparison_picture(Comparison(runs, runs, runs[:2]), tmp_path / "folder" / "picture.png", refresh_every=2)
    assert (tmp_path / "folder" / "picture.png").read_bytes()[:4] == b"\x89PNG"
