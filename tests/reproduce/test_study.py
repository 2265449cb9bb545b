"""A study: each entry is trained once, followers take what was chosen, and the time that is left is told."""

import pytest

from ask_lightning.losses import ReliabilityOTLoss
from ask_lightning.reproduce import LOSSES, LossVariant
from ask_lightning.reproduce.study import Entry, Study
from tests.reproduce.small_tasks import small_task

PLAIN = Entry("NT-Xent", LOSSES["NT-Xent"])
ASK = Entry("ASK", LOSSES["ASK"])
FEW = Entry(
    "few neighbours", LossVariant(ReliabilityOTLoss, LOSSES["ASK"].grid, {"num_neighbors": 2}), like=ASK
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return small_task(tmp_path_factory.mktemp("pairs"))


def make_study(task, output, lines):
    return Study(task, output, seeds=(3, 4), num_candidates=2, log=lines.append)


def test_entries_share_runs_and_followers_take_the_chosen_settings(task, tmp_path):
    lines = []
    study = make_study(task, tmp_path, lines)
    study.announce([PLAIN, FEW])
    trained = study.train([PLAIN, FEW])
    assert list(trained) == ["NT-Xent", "ASK", "few neighbours"]
    for name in ("NT-Xent", "ASK"):
        own = trained[name]
        assert [run.seed for run in own.runs] == [3, 4]
        best = max(own.tuning, key=lambda run: sum(run.metrics.validation.values()))
        assert own.runs[0].settings == best.settings
    assert not trained["few neighbours"].tuning
    assert trained["few neighbours"].runs[0].settings == trained["ASK"].runs[0].settings
    module, _ = trained["few neighbours"].method.build(trained["few neighbours"].runs[0].settings)
    assert module.loss.num_neighbors == 2
    assert all(run.metrics.test_calibrated is None for one in trained.values() for run in one.runs)

    # Two candidates and another seed of two, two seeds of the third.
    assert lines[0] == "8 runs to do, 0 are there."
    assert len(lines) == 9
    assert lines[1].startswith("7 runs, about ")
    assert lines[-1].startswith("0 runs, about 0 s left")

    again = make_study(task, tmp_path, lines)
    again.announce([ASK, FEW])
    assert again.train([ASK, FEW])["ASK"] == trained["ASK"] or lines[-1].startswith("0 runs to do")
    assert lines[-1] == "0 runs to do, 8 are there."


def test_one_seed_is_enough_where_an_entry_says_so(task, tmp_path):
    once = Entry("once", LOSSES["NT-Xent"], like=PLAIN, one_seed=True)
    trained = make_study(task, tmp_path, []).train([once])
    assert [run.seed for run in trained["once"].runs] == [3]


def test_tokens_need_a_model_that_has_them(task, tmp_path):
    tokens = Entry("tokens", LOSSES["NT-Xent"], tokens="frames")
    with pytest.raises(ValueError, match="embeddings has no model that is compared by tokens"):
        make_study(task, tmp_path, []).train([tokens])
