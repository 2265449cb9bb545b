"""A study: each entry is trained once, followers take what was chosen, and the time that is left is told."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from ask_lightning.callbacks import DriftMap, QueryTable
from ask_lightning.losses import MomentumContrastLoss, ReliabilityOTLoss
from ask_lightning.reproduce import LOSSES, LossVariant, compare
from ask_lightning.reproduce.study import Entry, Study, with_origins
from ask_lightning.reproduce.tasks import embeddings
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


def test_other_embeddings_under_the_same_path_need_another_folder(tmp_path):
    task = small_task(tmp_path)
    make_study(task, tmp_path / "runs", []).train([PLAIN])
    audio = tmp_path / "audio.npy"
    np.save(audio, 2 * np.load(audio))
    embeddings._load.cache_clear()  # as in another process
    with pytest.raises(ValueError, match="holds runs under another protocol: data '"):
        make_study(task, tmp_path / "runs", []).train([PLAIN])


def test_one_seed_is_enough_where_an_entry_says_so(task, tmp_path):
    once = Entry("once", LOSSES["NT-Xent"], like=PLAIN, one_seed=True)
    trained = make_study(task, tmp_path, []).train([once])
    assert [run.seed for run in trained["once"].runs] == [3]


def test_tokens_need_a_model_that_has_them(task, tmp_path):
    tokens = Entry("tokens", LOSSES["NT-Xent"], tokens="frames")
    with pytest.raises(ValueError, match="embeddings has no model that is compared by tokens"):
        make_study(task, tmp_path, []).train([tokens])


OBSERVED = LossVariant(ReliabilityOTLoss, LOSSES["ASK"].grid, callbacks=(QueryTable,))
MOMENTUM = LossVariant(MomentumContrastLoss, LOSSES["ASK"].grid, {"momentum": 0.5})


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (ASK, replace(ASK, variant=OBSERVED), "callbacks None →"),
        (
            replace(ASK, variant=OBSERVED),
            replace(ASK, variant=replace(OBSERVED, callbacks=(partial(QueryTable, every_n_epochs=2),))),
            "callbacks .*every_n_epochs",
        ),
        (
            replace(ASK, variant=OBSERVED),
            replace(ASK, variant=replace(OBSERVED, callbacks=(DriftMap,))),
            "callbacks .*DriftMap",
        ),
        (replace(PLAIN, tokens="frames"), replace(PLAIN, tokens="prototypes"), "tokens 'frames' →"),
        (
            Entry("x", MOMENTUM),
            Entry("x", replace(MOMENTUM, options={}, refresh={"momentum": 0.5})),
            "momentum 0.5 → None",
        ),
    ],
)
def test_entries_that_differ_in_anything_share_no_runs(task, tmp_path, one, other, difference):
    with pytest.raises(ValueError, match="a name of its own, but got "):
        with_origins([one, other])

    study = make_study(replace(task, make_token_model=len, max_epochs=0), tmp_path, [])
    noted = [study._method(entry) for entry in (one, other)]
    untrained = partial(compare, seeds=[0], jobs=1, log=len)
    for number, method in enumerate(noted):
        method = replace(method, build=_refuse)
        message = "The run of" if number == 0 else f"under another protocol: .*{difference}"
        with pytest.raises((RuntimeError, ValueError), match=message):
            untrained([method], study.task.protocol(), tmp_path)


def _refuse(settings):
    raise RuntimeError("nothing is trained here")
