"""Curves of a run, read from the file of Lightning's CSVLogger, and their picture."""

import csv

from ask_lightning.reproduce import Metrics, Run, training_picture
from ask_lightning.reproduce.figures import read_column

NAMES = [
    "epoch",
    "val/a2t/recall_at_10",
    "val/t2a/recall_at_10",
    "ask/probe_rdm_audio",
    "ask/probe_rdm_text",
    "ask/factor_a2t",
    "ask/factor_t2a",
]


def write_metrics(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, NAMES)
        writer.writeheader()
        writer.writerows(rows)


def test_steps_of_an_epoch_are_averaged_and_gaps_left_out(tmp_path):
    rows = [
        {"epoch": 0, "ask/factor_a2t": 1.0},
        {"epoch": 0, "ask/factor_a2t": 2.0},
        {"epoch": 1, "val/a2t/recall_at_10": 0.5},
        {"epoch": 2, "ask/factor_a2t": 3.0},
    ]
    write_metrics(tmp_path / "metrics.csv", rows)
    assert read_column(tmp_path / "metrics.csv", "ask/factor_a2t") == ([0, 2], [1.5, 3.0])
    assert read_column(tmp_path / "metrics.csv", "ask/factor_t2a") == ([], [])


def test_the_picture_shows_a_baseline_without_what_only_ask_logs(tmp_path):
    for method, names in (("NT-Xent", NAMES[:3]), ("ASK", NAMES)):
        (tmp_path / method).mkdir()
        rows = [{"epoch": epoch} | dict.fromkeys(names[1:], 0.5) for epoch in range(3)]
        write_metrics(tmp_path / method / "metrics.csv", rows)
    metrics = Metrics({}, {}, {}, {})
    runs = [Run(method, {}, 0, "tune", metrics, folder=tmp_path / method) for method in ("NT-Xent", "ASK")]
    training_picture(runs, tmp_path / "folder" / "picture.png", refresh_every=2)
    assert (tmp_path / "folder" / "picture.png").read_bytes()[:4] == b"\x89PNG"
