"""The protocol of a comparison: equal budgets, tuned on validation only, continued where it stopped."""

import errno
import json
import multiprocessing
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from ask_lightning import ASKModule
from ask_lightning.data import DatasetsDataModule
from ask_lightning.interaction import FrameWiseInteraction, TokenEmbeddings
from ask_lightning.losses import NTXentLoss
from ask_lightning.metrics.functional import check_finite
from ask_lightning.metrics.table import RECALLS, mean_recall
from ask_lightning.reproduce import (
    Method,
    Metrics,
    Protocol,
    compare,
    comparison,
    train_and_evaluate,
    tuning_markdown,
)
from ask_lightning.reproduce.run_table import RunsError, run_folder


def scores(value: float) -> dict[str, float]:
    return dict.fromkeys(RECALLS, value)


PROTOCOL = Protocol(make_data=lambda seed: seed, max_epochs=3, description={"batch_size": 32})
BEST = {"A": 0.05, "B": 0.2, "T": 0.1, "A + B": 0.1}


def methods(*temperatures, names=("A", "B")):
    candidates = tuple({"temperature": temperature} for temperature in temperatures)
    return [Method(name, candidates, partial(dict, name=name)) for name in names]


@pytest.fixture
def calls(monkeypatch):
    """Training in no time: records what is trained; validation speaks for `BEST`, tests for the largest."""
    made = []

    def train_and_evaluate(
        build, data, *, seed, folder, max_epochs, accelerator, trainer_options, loggers, calibrated
    ):
        built = build()
        assert (data, max_epochs, accelerator, trainer_options) == (seed, 3, "cpu", {})
        made.append((built["name"], built["temperature"], seed))
        if len(made) == train_and_evaluate.fails_at:
            raise train_and_evaluate.failure
        if made[-1] in train_and_evaluate.diverge:
            check_finite("audio", torch.tensor([[torch.nan]]))
        validation = scores(1 - abs(built["temperature"] - BEST[built["name"]]))
        calibrated = scores(built["temperature"]) if train_and_evaluate.calibration_differs else validation
        if built["name"] == "T":
            return Metrics(validation, scores(built["temperature"]))
        return Metrics(validation, scores(built["temperature"]), calibrated, scores(0.5))

    train_and_evaluate.fails_at = None
    train_and_evaluate.failure = ValueError("the loss is NaN")
    train_and_evaluate.diverge = set()
    train_and_evaluate.calibration_differs = False
    monkeypatch.setattr(comparison, "train_and_evaluate", train_and_evaluate)
    train_and_evaluate.made = made
    return train_and_evaluate


def test_every_method_has_the_same_runs_and_is_tuned_on_validation(calls, tmp_path):
    lines = []
    compared = compare(methods(0.05, 0.1, 0.2), PROTOCOL, tmp_path, seeds=[7, 8, 9], log=lines.append)
    runs = compared.raw
    assert compared.calibrated == runs
    assert [run.settings["temperature"] for run in compared.tuning] == 2 * [0.05, 0.1, 0.2]
    assert [(run.method, run.settings["temperature"], run.seed) for run in runs] == [
        (name, BEST[name], seed) for name in "AB" for seed in (7, 8, 9)
    ]
    for name in "AB":
        own = [call[1:] for call in calls.made if call[0] == name]
        assert own == [(0.05, 7), (0.1, 7), (0.2, 7), (BEST[name], 8), (BEST[name], 9)]
    assert [run.stage for run in runs[:3]] == ["tune", "test", "test"]
    assert len(lines) == 10
    assert lines[-1].startswith("[10/10] B, temperature=0.2, seed 9: validation mean recall 100.0 % (")


def test_calibrated_search_is_tuned_for_itself(calls, tmp_path):
    calls.calibration_differs = True
    lines = []
    compared = compare(methods(0.05, 0.1, 0.2), PROTOCOL, tmp_path, seeds=[7, 8], log=lines.append)
    chosen = [(run.method, run.settings["temperature"], run.seed) for run in compared.calibrated]
    assert chosen == [(name, 0.2, seed) for name in "AB" for seed in (7, 8)]
    assert [run.settings["temperature"] for run in compared.raw] == [0.05, 0.05, 0.2, 0.2]
    # What both chose is trained once.
    assert [call for call in calls.made if call[2] == 8] == [("A", 0.05, 8), ("B", 0.2, 8), ("A", 0.2, 8)]
    assert lines[-1].startswith("[9/9] A")


def test_a_model_with_an_interaction_is_tuned_by_it_alone(calls, tmp_path):
    compared = compare(methods(0.05, 0.1, names="AT"), PROTOCOL, tmp_path, seeds=[7, 8], log=len)
    assert [run.method for run in compared.raw] == ["A", "A", "T", "T"]
    assert [run.method for run in compared.calibrated] == ["A", "A"]
    assert {run.settings["temperature"] for run in compared.raw[2:]} == {0.1}
    again = compare(methods(0.05, 0.1, names="AT"), PROTOCOL, tmp_path, seeds=[7, 8], log=len)
    assert again == compared


def test_a_repeated_comparison_trains_only_what_is_missing(calls, tmp_path):
    runs = compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[0, 1], log=len)
    del calls.made[:]
    assert compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[0, 1], log=len) == runs
    assert calls.made == []
    compare(methods(0.05, 0.1, names="BA"), PROTOCOL, tmp_path, seeds=[0, 1, 2], log=len)
    assert sorted(calls.made) == [("A", 0.05, 2), ("B", 0.1, 2)]


def test_a_failed_run_is_named_and_the_finished_ones_are_kept(calls, tmp_path):
    calls.fails_at = 3
    message = "The run of B with temperature=0.05, seed 0, failed: the loss is NaN"
    with pytest.raises(RuntimeError, match=message):
        compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[0], log=len)
    calls.fails_at = None
    del calls.made[:]
    compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[0], log=len)
    assert calls.made == [("B", 0.05, 0), ("B", 0.1, 0)]


def test_a_run_that_finds_the_disk_full_fails_as_what_a_user_can_mend(calls, tmp_path):
    calls.fails_at, calls.failure = 2, OSError(errno.ENOSPC, "No space left on device", "best.ckpt")
    with pytest.raises(OSError, match=r"The run of A .* failed: .* No space left on device: 'best\.ckpt'"):
        compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[0], log=len)


def test_a_candidate_that_diverges_has_been_tried_and_is_not_chosen(calls, tmp_path):
    calls.diverge = {("A", 0.05, 7)}
    lines = []
    compared = compare(methods(0.05, 0.1, 0.2), PROTOCOL, tmp_path, seeds=[7, 8], log=lines.append)
    assert [run.settings["temperature"] for run in compared.raw] == [0.1, 0.1, 0.2, 0.2]
    assert [(run.method, run.settings["temperature"]) for run in compared.failed] == [("A", 0.05)]
    assert len(compared.tuning) == 5
    assert lines[0].startswith(
        "[1/6] A, temperature=0.05, seed 7: diverged, so it is not chosen. Argument `audio` has to be finite"
    )
    assert "| A | temperature=0.05 | diverged | diverged |" in tuning_markdown(compared)
    assert lines[-1].startswith("[8/8] ")

    del calls.made[:]
    again = compare(methods(0.05, 0.1, 0.2), PROTOCOL, tmp_path, seeds=[7, 8], log=len)
    assert (again, calls.made) == (compared, [])
    with pytest.raises(ValueError, match=r"no candidates any more .temperature=0\.05\)"):
        compare(methods(0.1, 0.2), PROTOCOL, tmp_path, seeds=[7], log=len)


def test_a_method_without_a_candidate_that_is_left_is_named(calls, tmp_path):
    calls.diverge = {("A", 0.05, 7), ("A", 0.1, 7)}
    message = r"All candidates of A diverged.* temperature=0\.05: Argument .*; temperature=0\.1: Argument"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[7, 8], log=len)
        assert calls.made == [(name, value, 7) for name in "AB" for value in (0.05, 0.1)]


def test_a_seed_that_diverges_is_not_left_out_of_a_mean(calls, tmp_path):
    calls.diverge = {("A", 0.05, 8)}
    with pytest.raises(RuntimeError, match=r"The run of A with temperature=0\.05, seed 8, failed: Argument"):
        compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[7, 8], log=len)


def test_another_protocol_needs_another_folder(calls, tmp_path):
    compare(methods(0.1), PROTOCOL, tmp_path, seeds=[0], log=len)
    other = Protocol(PROTOCOL.make_data, max_epochs=3, description={"batch_size": 64})
    with pytest.raises(ValueError, match=r"under another protocol: batch_size 32 → 64\. Use another"):
        compare(methods(0.1), other, tmp_path, seeds=[0], log=len)
    assert json.loads((tmp_path / "protocol.json").read_text())["batch_size"] == 32


@pytest.mark.parametrize("content", ['{"max_epochs": 3,', "[]", '{"methods": 3}', '{"methods": {"A": 3}}'])
def test_a_damaged_protocol_is_named(calls, tmp_path, content):
    compare(methods(0.1), PROTOCOL, tmp_path, seeds=[0], log=len)
    (tmp_path / "protocol.json").write_text(content)
    with pytest.raises(RunsError, match=r"protocol\.json is damaged .* Use another folder"):
        compare(methods(0.1), PROTOCOL, tmp_path, seeds=[0, 1], log=len)
    assert (tmp_path / "protocol.json").read_text() == content


def test_what_was_computed_of_earlier_weights_goes_with_them(calls, tmp_path):
    compare(methods(0.1, names="A"), PROTOCOL, tmp_path, seeds=[0], log=len)
    kept = run_folder(tmp_path, "A", {"temperature": 0.1}, 0) / "transfer-elsewhere.json"
    kept.parent.mkdir(exist_ok=True)
    kept.touch()
    compare(methods(0.1, names="A"), PROTOCOL, tmp_path, seeds=[0], log=len)
    assert kept.exists()
    runs = tmp_path / "runs.csv"
    runs.write_text(runs.read_text().splitlines(keepends=True)[0])
    compare(methods(0.1, names="A"), PROTOCOL, tmp_path, seeds=[0], log=len)
    assert not kept.exists()


def test_runs_without_their_protocol_are_refused(calls, tmp_path):
    compare(methods(0.1), PROTOCOL, tmp_path, seeds=[0], log=len)
    (tmp_path / "protocol.json").unlink()
    with pytest.raises(RunsError, match=r"protocol\.json is missing, .* Put it back, or use another folder"):
        compare(methods(0.1), PROTOCOL, tmp_path, seeds=[0, 1], log=len)


def test_a_method_with_other_options_needs_another_folder(calls, tmp_path):
    def described(**options):
        return [replace(method, description=options) for method in methods(0.1, names="A")]

    compare(described(positives="diagonal", T=5), PROTOCOL, tmp_path, seeds=[0], log=len)
    with pytest.raises(ValueError, match=r"under another protocol: A: T 5 → 15\. Use another"):
        compare(described(positives="diagonal", T=15), PROTOCOL, tmp_path, seeds=[0], log=len)
    compare(methods(0.1, names="B"), PROTOCOL, tmp_path, seeds=[0], log=len)
    compare(described(positives="diagonal", T=5), PROTOCOL, tmp_path, seeds=[0, 1], log=len)
    noted = json.loads((tmp_path / "protocol.json").read_text())
    assert noted["methods"] == {"A": {"positives": "diagonal", "T": 5}, "B": {}}


def test_functions_among_the_options_are_known_in_another_process(calls, tmp_path):
    """Where a function lies in memory is another place in each process."""
    source = partial(make_data, tmp_path, seed=partial(len, (1, 2)))
    (method,) = methods(0.1, names=("A",))
    compare([replace(method, description={"source": source})], PROTOCOL, tmp_path, seeds=[7], log=len)
    noted = json.loads((tmp_path / "protocol.json").read_text())["methods"]["A"]["source"]
    assert noted == [f"{__name__}.make_data", str(tmp_path), {"seed": ["builtins.len", [1, 2]]}]
    other = replace(method, description={"source": partial(make_data, tmp_path, seed=1)})
    with pytest.raises(ValueError, match="under another protocol: A: source"):
        compare([other], PROTOCOL, tmp_path, seeds=[7], log=len)


def test_settings_that_have_been_tried_count(calls, tmp_path):
    compare(methods(0.05, 0.1), PROTOCOL, tmp_path, seeds=[0, 1], log=len)
    compare(methods(0.05, 0.1, 0.2), PROTOCOL, tmp_path, seeds=[0, 1], log=len)
    message = r"of A with settings that are no candidates any more .temperature=0\.05; temperature=0\.2\)"
    with pytest.raises(ValueError, match=message):
        compare(methods(0.1, 0.3), PROTOCOL, tmp_path, seeds=[0], log=len)
    compare(methods(0.05, 0.1, 0.2, 0.3), PROTOCOL, tmp_path, seeds=[0], log=len)
    compare(methods(0.4), PROTOCOL, tmp_path, seeds=[0], log=len)  # nothing is chosen


def test_methods_that_are_not_tuned_alike(calls, tmp_path):
    uneven = [*methods(0.1, 0.2, names="A"), *methods(0.1, names="B")]
    with pytest.raises(ValueError, match=r"same number of different candidates, .* got A: 2, B: 1\. Tune"):
        compare(uneven, PROTOCOL, tmp_path)
    with pytest.raises(ValueError, match=r"got A: 1, B: 2"):
        compare([*methods(0.1, 0.1, names="A"), *methods(0.1, 0.2, names="B")], PROTOCOL, tmp_path)
    with pytest.raises(ValueError, match=r"at least one, but got A: 0"):
        compare(methods(names="A"), PROTOCOL, tmp_path)
    assert calls.made == []


@pytest.mark.parametrize(
    ("names", "seeds", "message"),
    [
        ("", [0], r"`methods` has to hold at least one value and none twice, but got \[\]"),
        ("AA", [0], r"`methods` .* but got \['A', 'A'\]"),
        ("A", [], r"`seeds` .* but got \[\]"),
        ("A", [1, 1], r"`seeds` .* but got \[1, 1\]"),
    ],
)
def test_nothing_to_compare_or_twice_the_same(tmp_path, names, seeds, message):
    with pytest.raises(ValueError, match=message):
        compare(methods(0.1, names=names), PROTOCOL, tmp_path, seeds=seeds)


def test_names_that_differ_in_signs_alone_would_share_folders(calls, tmp_path):
    message = r"The runs of 'A \+ B' with temperature=0.1 and of 'A, B' .* share the folder 'A-B-temp"
    with pytest.raises(ValueError, match=message):
        compare(methods(0.1, names=("A + B", "A, B")), PROTOCOL, tmp_path, seeds=[0])
    compare(methods(0.1, names=("A + B",)), PROTOCOL, tmp_path, seeds=[0], log=lambda line: None)
    with pytest.raises(ValueError, match=message):
        compare(methods(0.1, names=("A, B",)), PROTOCOL, tmp_path, seeds=[0])


class Pairs(Dataset):
    """Noisy pairs of vectors."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.audio = torch.randn(count, 8, generator=generator)
        self.text = self.audio + 0.3 * torch.randn(count, 8, generator=generator)

    def __len__(self):
        return len(self.audio)

    def __getitem__(self, row):
        return {"audio": self.audio[row], "text": self.text[row], "clip_id": row}


class Heads(pl.LightningModule):
    """Two linear maps; the validation metric it logs says that its first epoch was the best."""

    def __init__(self, learning_rate):
        super().__init__()
        self.learning_rate = learning_rate
        self.audio_head, self.text_head = nn.Linear(8, 4), nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def encode_audio(self, batch):
        return self.dropout(self.audio_head(batch["audio"]))

    def encode_text(self, batch):
        return self.dropout(self.text_head(batch["text"]))

    def training_step(self, batch, batch_idx):
        similarity = self.encode_text(batch) @ self.encode_audio(batch).T
        return nn.functional.cross_entropy(similarity, torch.arange(len(similarity)))

    def validation_step(self, batch, batch_idx):
        self.log("val/mean_recall", 1 / (1 + self.current_epoch), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.learning_rate)


def make_data(seed):
    return DatasetsDataModule(*(Pairs(count, count) for count in (48, 16, 24)), batch_size=16, seed=seed)


def build(settings):
    return Heads(**settings), []


def real(output, max_epochs, **options):
    method = Method("heads", ({"learning_rate": 0.3}, {"learning_rate": 0.1}), build)
    return compare([method], Protocol(make_data, max_epochs), output, seeds=[0, 1], log=len, **options)


def test_the_best_epoch_on_validation_is_evaluated(tmp_path):
    one, three = (real(tmp_path / str(epochs), epochs) for epochs in (1, 3))
    assert [run.metrics for run in one.raw] == [run.metrics for run in three.raw]
    assert one.raw[0].metrics != one.raw[1].metrics
    assert 0 < mean_recall(one.raw[0].metrics.test) < 1
    assert (three.raw[1].folder / "metrics.csv").exists()


def test_options_of_the_trainer_are_those_of_the_protocol(tmp_path):
    method = Method("heads", ({"learning_rate": 0.3},), build)
    (usual,), (clipped,) = (
        compare([method], protocol, tmp_path / str(number), seeds=[0], log=len).raw
        for number, protocol in enumerate(
            (Protocol(make_data, 1), Protocol(make_data, 1, trainer_options={"gradient_clip_val": 1e-9}))
        )
    )
    weights = [
        torch.load(run.folder / "best.ckpt", weights_only=True)["state_dict"] for run in (usual, clipped)
    ]
    pl.seed_everything(0, verbose=False)
    first = Heads(0.3).state_dict()
    moved = [max((first[name] - values[name]).abs().max() for name in first) for values in weights]
    assert moved[0] > 1e-2
    assert moved[1] < 1e-7
    assert json.loads((tmp_path / "1" / "protocol.json").read_text())["gradient_clip_val"] == 1e-9


@pytest.mark.slow
def test_runs_in_processes_of_their_own_are_the_same(tmp_path):
    assert real(tmp_path / "one", 2) == real(tmp_path / "two", 2, jobs=2)


def wait_as_a_worker(folder):
    comparison._start_worker(1)
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(100)


def start_a_worker(folder):
    worker = multiprocessing.get_context("fork").Process(target=wait_as_a_worker, args=(folder,))
    worker.start()
    worker.join()


def test_a_worker_ends_with_the_comparison_that_was_killed(tmp_path):
    """It would write to the folders of a comparison that is continued."""
    parent = multiprocessing.get_context("fork").Process(target=start_a_worker, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("*.pid"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = (int(path.stem) for path in found)
    assert is_running(worker)
    parent.kill()
    parent.join()
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid):
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class FramesAndWords(Heads):
    """Heads that compare tokens; their pooled embeddings say nothing."""

    def __init__(self, learning_rate):
        super().__init__(learning_rate)
        self.interaction = FrameWiseInteraction(4)

    def encode_audio(self, batch):
        frames = self.audio_head(batch["audio"]).unsqueeze(1)
        # The last batch is shorter: it has other numbers of frames.
        frames = nn.functional.pad(frames, (0, 0, 0, len(frames) % 3))
        mask = torch.arange(frames.shape[1]).expand(len(frames), -1) < 1
        return TokenEmbeddings(torch.ones_like(frames[:, 0]), frames, mask)

    def encode_text(self, batch):
        words = self.text_head(batch["text"])
        return TokenEmbeddings(words, words.unsqueeze(1))

    def training_step(self, batch, batch_idx):
        scores = self.interaction(self.encode_text(batch), self.encode_audio(batch)).to_audio
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def build_with_tokens(settings):
    return ASKModule(FramesAndWords(**settings), NTXentLoss(0.1, interaction="interaction")), []


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_is_ranked_by_its_interaction(tmp_path, wrapped):
    metrics = train_and_evaluate(
        (lambda: build_with_tokens({"learning_rate": 0.3})) if wrapped else lambda: (FramesAndWords(0.3), []),
        make_data(0),
        seed=0,
        folder=tmp_path / "run",
        max_epochs=2,
    )
    assert metrics.calibration is None
    # Pooled audio embeddings are all the same: by them every clip would have the last rank.
    assert metrics.test["t2a/recall_at_10"] > 0.3
