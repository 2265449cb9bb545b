"""The table of recalls after `fit`, `validate` and `test`."""

import pytest

from tests.helpers.command_line import ASK, ask_lightning, csv_rows, log_folder, logged


def test_after_fit_there_are_the_best_and_the_last_epoch(trained):
    best, last = csv_rows(log_folder(trained) / "recall.csv")
    assert best["% of"].startswith("validation, best epoch (")
    assert last["% of"] == "validation, last epoch (1)"
    curves = logged(trained)
    assert float(last["T2A R@10"]) == pytest.approx(100 * curves["val/t2a/recall_at_10"][-1], abs=1e-3)


@pytest.mark.parametrize(("command", "row"), [("validate", "validation"), ("test", "test")])
def test_after_validate_and_test_there_is_the_split(command, row, demo, trained, capsys):
    given = ("--config", ASK, demo, "--run", "run", "--ckpt_path", trained / "checkpoints" / "best.ckpt")
    ask_lightning(command, *given)
    scores, *others = csv_rows(log_folder("run") / "recall.csv")
    assert scores["% of"] == row
    assert [other["% of"] for other in others] == (["test, calibrated"] if command == "test" else [])
    assert 0 <= float(scores["T2A R@10"]) <= 100
