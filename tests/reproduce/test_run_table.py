"""Runs survive the way through the file, and a line that was not finished is as if it had not been begun."""

import csv
from dataclasses import replace

import pytest

from ask_lightning.metrics import Calibration
from ask_lightning.metrics.table import RECALLS
from ask_lightning.reproduce import Metrics, Run
from ask_lightning.reproduce.run_table import RunTable, run_folder


def make_run(output, method="NT-Xent", seed=0, value=1 / 3):
    parts = [dict.fromkeys(RECALLS, value + number / 10) for number in range(4)]
    settings = {"temperature": 0.1, "T": 5}
    return Run(
        method,
        settings,
        seed,
        "tune",
        Metrics(*parts, calibration=Calibration("nearest_neighbors", num_neighbors=128, gate_top_k=1)),
        12.0,
        run_folder(output, method, settings, seed),
    )


def test_what_is_appended_is_read(tmp_path):
    table = RunTable(tmp_path / "new")
    assert table.read() == {}
    runs = [make_run(table.output, 'a, "quoted" name', seed) for seed in range(3)]
    for run in runs:
        table.append(run)
    read = list(RunTable(tmp_path / "new").read().values())
    assert read == runs
    assert [run.folder for run in read] == [run.folder for run in runs]
    assert len(table.path.read_text().splitlines()) == 4


def test_a_run_without_calibrated_search_has_empty_cells(tmp_path):
    table = RunTable(tmp_path)
    whole = make_run(tmp_path)
    metrics = Metrics(whole.metrics.validation, whole.metrics.test)
    run = replace(whole, metrics=metrics, method="GPA")
    table.append(whole)
    table.append(run)
    (row,) = [row for row in csv.DictReader(table.path.open()) if row["method"] == "GPA"]
    empty = {name for name, cell in row.items() if not cell}
    assert empty == {"calibration", *(name for name in row if "_calibrated/" in name)}
    assert list(table.read().values()) == [whole, run]


@pytest.mark.parametrize("lost", [1, 40])
def test_a_torn_last_line_is_dropped(tmp_path, lost):
    table = RunTable(tmp_path)
    for seed in range(2):
        table.append(make_run(tmp_path, seed=seed))
    table.path.write_text(table.path.read_text()[:-lost])
    assert [run.seed for run in table.read().values()] == [0]
    table.append(make_run(tmp_path, seed=2))
    assert [run.seed for run in table.read().values()] == [0, 2]


def test_a_line_that_is_torn_within_a_character_is_dropped(tmp_path):
    table = RunTable(tmp_path)
    for seed in range(2):
        table.append(make_run(tmp_path, "ρ = 0.1", seed))
    content = table.path.read_bytes()
    table.path.write_bytes(content[: content.rfind("ρ".encode()) + 1])
    assert [run.seed for run in table.read().values()] == [0]
    assert table.path.read_bytes() == content[: len(table.path.read_bytes())], "cut off, not written anew"


def test_a_line_that_is_damaged_in_the_midst_is_named(tmp_path):
    table = RunTable(tmp_path)
    for seed in range(3):
        table.append(make_run(tmp_path, seed=seed))
    lines = table.path.read_text().splitlines()
    table.path.write_text("\n".join([*lines[:2], lines[2][:60], lines[3], ""]))
    with pytest.raises(ValueError, match=r"runs\.csv, line 3, is damaged .* Remove the line"):
        table.read()
    table.path.write_text("\n".join([*lines[:2], "x" * 200_000, lines[3], ""]))
    with pytest.raises(ValueError, match=r"runs\.csv, line 3, is damaged \(field larger .* Remove the line"):
        table.read()
    table.failed_path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"failed\.csv, line 2, is damaged"):
        table.read_failed()


def test_a_torn_heading_is_written_again(tmp_path):
    table = RunTable(tmp_path)
    table.path.write_text("method,sett")
    assert table.read() == {}
    table.append(make_run(tmp_path))
    assert len(table.read()) == 1


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"runs\.csv has other columns than this version writes"):
        RunTable(tmp_path).read()


def test_folders_of_runs_differ(tmp_path):
    settings = [{"temperature": 0.1}, {"temperature": 0.01}, {"learning_rate": 0.1}]
    folders = {run_folder(tmp_path, "A + b", knobs, seed) for knobs in settings for seed in (0, 1)}
    assert len(folders) == 6
    assert {folder.parent for folder in folders} == {tmp_path}


def test_calibrations_of_another_version_are_refused(tmp_path):
    table = RunTable(tmp_path)
    table.append(make_run(tmp_path))
    table.path.write_text(table.path.read_text().replace('""kind""', '""way""'))
    with pytest.raises(
        ValueError, match=r"runs.csv holds calibrations of another kind .* Use another folder"
    ):
        table.read()


def test_a_line_without_recalls_or_in_another_encoding_is_named(tmp_path):
    table = RunTable(tmp_path)
    for seed in range(2):
        table.append(make_run(tmp_path, seed=seed))
    whole = table.path.read_bytes()
    with table.path.open(newline="") as file:
        rows = list(csv.reader(file))
    emptied = ["" if name.startswith("validation/") else cell for name, cell in zip(*rows[:2], strict=True)]
    with table.path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([rows[0], emptied, rows[2]])
    with pytest.raises(ValueError, match=r"runs\.csv, line 2, is damaged .* empty.* Remove the line"):
        table.read()
    table.path.write_bytes(whole.replace(b"\nNT-Xent", b"\n\xff-Xent", 1))
    with pytest.raises(ValueError, match=r"runs\.csv, line 2, is damaged: it is no UTF-8"):
        table.read()


def test_two_results_of_one_run_are_refused(tmp_path):
    table = RunTable(tmp_path)
    for run in (make_run(tmp_path), make_run(tmp_path, seed=1), make_run(tmp_path)):
        table.append(run)
    assert list(table.read().values()) == [make_run(tmp_path), make_run(tmp_path, seed=1)]
    table.append(make_run(tmp_path, value=0.5))
    with pytest.raises(ValueError, match=r"runs\.csv, line 5, has other results .* Remove both lines"):
        table.read()


@pytest.mark.parametrize("cell", ["41.7", "nan", "-0.1"])
def test_recalls_that_are_no_shares_are_refused(tmp_path, cell):
    table = RunTable(tmp_path)
    table.append(make_run(tmp_path, value=0.125))
    table.path.write_text(table.path.read_text().replace("0.125", cell, 1))
    with pytest.raises(ValueError, match=r"line 2, is damaged \(validation/.* no share from 0 to 1"):
        table.read()


def test_a_file_of_a_run_that_is_gone_is_named(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(ValueError, match=r"metrics\.csv is missing, .* NT-Xent with T=5, .* seed 0"):
        run.file("metrics.csv")
    run.folder.mkdir()
    (run.folder / "metrics.csv").touch()
    assert run.file("metrics.csv") == run.folder / "metrics.csv"
