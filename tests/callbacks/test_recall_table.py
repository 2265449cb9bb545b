"""The table of recalls after `fit`, `validate` and `test`."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from ask_lightning.callbacks import RecallTable
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


class Epoch:
    """A trainer after an epoch: text-to-audio is best in epoch 0, both directions together in epoch 1."""

    sanity_checking = False
    state = SimpleNamespace(fn=TrainerFn.FITTING)

    def __init__(self, number):
        self.current_epoch = number
        recalls = {"t2a": 0.5, "a2t": 0.1} if number == 0 else {"t2a": 0.4, "a2t": 0.9}
        self.callback_metrics = {
            f"val/{direction}/{name}": torch.tensor(recall)
            for direction, recall in recalls.items()
            for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mean_recall")
        }


@pytest.mark.parametrize(("monitor", "best"), [(None, 1), ("val/t2a/mean_recall", 0)])
def test_the_best_epoch_is_that_of_the_monitor(monitor, best):
    table = RecallTable(monitor)
    for number in range(2):
        table.on_validation_end(Epoch(number), None)
    assert table.state_dict()["epoch"] == best
    other = RecallTable(monitor)
    other.load_state_dict(table.state_dict())
    other.on_validation_end(Epoch(0), None)
    assert other.state_dict() == table.state_dict()


def test_a_new_run_knows_nothing_of_the_one_before():
    table = RecallTable()
    for number in range(2):
        table.on_validation_end(Epoch(number), None)
    table.setup(Epoch(1), None, "fit")  # which goes on
    assert table.state_dict()["epoch"] == 1
    table.setup(Epoch(0), None, "fit")
    table.on_validation_end(Epoch(0), None)
    assert table.state_dict()["epoch"] == 0, "although the run before was better"


def test_a_monitor_that_is_not_logged():
    message = r"chosen by 'val/recall', which the model does not log; it logs val/t2a/recall_at_1"
    with pytest.raises(RuntimeError, match=message):
        RecallTable("val/recall").on_validation_end(Epoch(0), None)
