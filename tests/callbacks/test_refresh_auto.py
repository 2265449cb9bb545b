"""`T="auto"`: a refresh when the drift that the steps see asks for it and the time allows it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from ask_lightning import KnowledgeDistillationLoss, KnowledgeRefreshCallback
from ask_lightning.callbacks.auto_period import AutoPeriod, AutoSchedule
from ask_lightning.callbacks.drift_tracker import DriftTracker
from ask_lightning.callbacks.time_budget import TimeBudget
from ask_lightning.functional.drift import mean_displacement, mean_spread
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.clients import Pairs, PlainTowers
from tests.helpers.interrupted_run import Stop, Stopped
from tests.helpers.ranks import on_ranks
from tests.helpers.renewal_run import PAIRS, assert_goes_on, fit, logged
from tests.helpers.vectors import directions

# Refreshes of tiny runs take most of their time.
FREE = {"max_share": 1.0}


def bases_of(run: dict) -> list[int]:
    """The number of the base that each epoch trains with."""
    names = run["knowledge"][::6]
    return [sorted(set(names), key=names.index).index(name) for name in names]


def refreshed_after(run: dict) -> list[bool]:
    """Whether each epoch but the last was followed by a refresh."""
    numbers = bases_of(run)
    return [now != before for before, now in itertools.pairwise(numbers)]


class Dropped(PlainTowers):
    """With dropout, whose noise is no drift."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.dropout = nn.Dropout(0.5)

    def encode_audio(self, batch):
        return self.audio_encoder(self.dropout(batch["audio"]))


class TestDrift:
    def test_displacement_and_spread_against_loops_in_float64(self):
        rows, stored = (directions(9, 5, seed, torch.float64) for seed in (0, 1))
        moved = np.mean([1 - float(one @ other) for one, other in zip(rows, stored, strict=True)])
        apart = np.mean([1 - float(rows[i] @ rows[j]) for i in range(9) for j in range(9) if i != j])
        assert float(mean_displacement(rows, stored)) == pytest.approx(moved, abs=1e-14)
        assert float(mean_spread(rows)) == pytest.approx(apart, abs=1e-14)

    def test_it_is_the_larger_of_both_modalities_in_units_of_the_spread(self):
        audio, text = directions(16, 8, 0), directions(16, 8, 1)
        moved = nn.functional.normalize(audio + 0.3 * directions(16, 8, 2), dim=1)
        tracker = DriftTracker()
        tracker.add((audio, text), (audio, text), is_floor=True)
        for _ in range(200):
            tracker.add((moved, text), (audio, text))
        expected = float(mean_displacement(moved.double(), audio.double()) / mean_spread(moved.double()))
        assert tracker.drift == pytest.approx(expected, rel=1e-4)

    def test_noise_that_is_there_from_the_start_is_no_drift(self):
        """Dropout turns rows by as much after a drift as before it."""
        generator = torch.Generator().manual_seed(0)
        stored = directions(4000, 64, 0)
        drifted = nn.functional.normalize(stored + 0.4 * directions(4000, 64, 1), dim=1)

        def noisy(rows):
            noise = torch.randn(rows.shape, generator=generator) / 8
            return nn.functional.normalize(rows + 0.7 * noise, dim=1)

        tracker = DriftTracker()
        tracker.add((noisy(stored), stored), (stored, stored), is_floor=True)
        assert tracker.drift == 0
        for _ in range(150):
            tracker.add((noisy(drifted), stored), (stored, stored))
        true = float(mean_displacement(drifted, stored) / mean_spread(drifted))
        assert tracker.drift == pytest.approx(true, rel=0.03)
        assert float(mean_displacement(noisy(stored), stored)) > 2 * true, (
            "the noise is larger than the drift"
        )

    def test_forgets_at_a_refresh(self):
        tracker, rows = DriftTracker(), directions(8, 4, 0)
        tracker.add((rows, rows), (rows, rows))
        tracker.add((rows.flip(0), rows), (rows, rows))
        assert tracker.drift > 0
        tracker.restart()
        assert tracker.is_empty
        assert tracker.drift == 0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestDecision:
    def schedule(self, **bounds) -> tuple[AutoSchedule, Clock]:
        clock = Clock()
        schedule = AutoSchedule(AutoPeriod(**bounds), TimeBudget(clock))
        schedule.budget.start()
        return schedule, clock

    def see(self, schedule: AutoSchedule, drift: float) -> None:
        """Batches whose rows are that far from what is stored, in units of their spread."""
        rows = torch.eye(2)  # of spread 1
        turned = torch.tensor([[1 - drift, math.sqrt(1 - (1 - drift) ** 2)], [0.0, 1.0]])
        turned[1] = torch.stack([-turned[0, 1], turned[0, 0]])
        schedule.add((rows, rows), (rows, rows), step=schedule._refreshed_at)
        for _ in range(300):
            schedule.add((turned, rows), (rows, rows), step=10_000)

    def test_hysteresis(self):
        schedule, clock = self.schedule(max_drift=0.1, max_share=0.1)
        schedule.note_refresh(10.0, step=0, is_first=True)
        decisions = []
        for now, drift in ((0, 0.2), (0, 0.07), (200, 0.07), (200, 0.04), (200, 0.07)):
            clock.now = now
            self.see(schedule, drift)
            decisions.append(schedule.decide(Ranks()))
        # Wanted at first but too expensive; still wanted above half of the bound; no longer below it.
        assert decisions == [False, False, True, False, False]

    def test_budget(self):
        schedule, clock = self.schedule(max_drift=0.1, max_share=0.1)
        schedule.note_refresh(10.0, step=0, is_first=True)
        self.see(schedule, 0.5)
        refreshed = []
        for epoch in range(1, 41):
            clock.now = 20.0 * epoch
            if schedule.decide(Ranks()):
                refreshed.append(epoch)
                schedule.note_refresh(10.0, step=epoch, is_first=False)
                assert schedule.share(Ranks()) <= 0.1
                self.see(schedule, 0.5)
        assert refreshed == [5, 10, 15, 20, 25, 30, 35, 40]
        assert schedule.num_refreshes == 8

    def test_nothing_measured_asks_for_nothing(self):
        schedule, clock = self.schedule(max_drift=0.1, max_share=1.0)
        clock.now = 1e6
        assert not schedule.decide(Ranks())
        assert math.isnan(schedule.drift(Ranks()))

    def test_state(self):
        schedule, clock = self.schedule(max_drift=0.1, max_share=0.1)
        schedule.note_refresh(10.0, step=7, is_first=True)
        self.see(schedule, 0.2)
        clock.now = 50.0
        assert not schedule.decide(Ranks())
        again, later = self.schedule(max_drift=0.1, max_share=0.1)
        again.load_state(schedule.state(Ranks()), Ranks())
        assert again.drift(Ranks()) == schedule.drift(Ranks())
        assert again.state(Ranks()) == schedule.state(Ranks())
        later.now = 50.0
        assert again.decide(Ranks()), "100 s of both parts of the run"


def test_refreshes_where_the_drift_is_large_and_not_where_it_is_small():
    still = fit(T=AutoPeriod(max_drift=0.05, **FREE), epochs=5, learning_rate=1e-5)
    assert bases_of(still) == [0] * 5
    assert logged(still, "ask/refresh_share") == [0] * 5
    moving = fit(T=AutoPeriod(max_drift=0.05, **FREE), epochs=5, learning_rate=3e-2)
    drift = logged(moving, "ask/drift")
    assert refreshed_after(moving) == [value > 0.05 for value in drift[:-1]]
    assert any(refreshed_after(moving))
    assert logged(moving, "ask/refreshes") == bases_of(moving)
    assert 0 < logged(moving, "ask/refresh_share")[-1] < 1
    assert max(logged(still, "ask/drift")) < 0.01 < max(drift)


def test_dropout_alone_is_no_reason():
    run = fit(T=AutoPeriod(max_drift=0.05, **FREE), epochs=4, model=Dropped(learning_rate=1e-6))
    assert bases_of(run) == [0] * 4


def test_auto_is_the_default_bounds():
    refresh = KnowledgeRefreshCallback("auto")
    assert AutoPeriod(max_drift=0.05, max_share=0.1) == refresh.T


def test_no_time_no_refresh():
    run = fit(T=AutoPeriod(max_drift=0.05, max_share=1e-9), epochs=3, learning_rate=3e-2)
    assert bases_of(run) == [0] * 3
    assert min(logged(run, "ask/drift")) > 0.05


def test_resumed_exactly(tmp_path):
    options = {"T": AutoPeriod(max_drift=0.2, **FREE), "epochs": 6, "learning_rate": 1e-2}
    whole = fit(1, tmp_path / "whole", **options)
    assert 1 < len(set(whole["knowledge"])) < 6, "some epochs refresh and others do not"
    for epoch in (1, 3):
        with pytest.raises(Stopped):
            fit(1, tmp_path / f"one{epoch}", extra=(Stop(epoch),), **options)
        resumed = fit(1, tmp_path / f"two{epoch}", resume=tmp_path / f"one{epoch}" / "last.ckpt", **options)
        assert_goes_on(resumed, whole, epoch)
        assert logged(resumed, "ask/drift") == logged(whole, "ask/drift")[epoch:]
        assert logged(resumed, "ask/refreshes") == logged(whole, "ask/refreshes")[epoch:]


def test_knowledge_of_a_checkpoint_without_a_drift_is_encoded_anew(tmp_path):
    """Its first batch would otherwise pass for one right after a refresh, and hide how old the rows are."""
    fit(1, tmp_path, T=10**6, epochs=2)
    with pytest.warns(UserWarning, match=r"newly encoded knowledge.* lacks the drift since its encoding"):
        fit(T=AutoPeriod(max_drift=1e6), epochs=3, resume=tmp_path / "last.ckpt")


def test_training_clips_beside_another_source_are_compared():
    loss = KnowledgeDistillationLoss(temperature=0.2)
    options = {"source": Pairs(20, seed=3), "loss": loss, "epochs": 3}
    run = fit(T=AutoPeriod(max_drift=0.03, **FREE), learning_rate=3e-2, **options)
    assert refreshed_after(run) == [value > 0.03 for value in logged(run, "ask/drift")[:-1]]
    assert any(refreshed_after(run))


def test_a_source_without_the_clips_of_the_batches():
    pairs = Pairs(PAIRS)
    pairs.clip_id = pairs.clip_id + 1000
    with pytest.raises(RuntimeError, match=r'T="auto".*compares training batches'):
        fit(T="auto", source=pairs, epochs=2)


def test_without_ids():
    with pytest.raises(RuntimeError, match=r'T="auto".*finds the rows of a batch by their clip ids'):
        fit(T="auto", ids=None, epochs=1)


def two_ranks(placement: str) -> dict:
    return fit(2, T=AutoPeriod(max_drift=0.2, **FREE), epochs=5, placement=placement)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_two_ranks_decide_alike(placement):
    one, other = on_ranks(2, two_ranks, placement, grouped=False)
    assert one["knowledge"] == other["knowledge"]
    assert 1 < len(set(one["knowledge"])) < 5
    assert logged(one, "ask/drift")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: KnowledgeRefreshCallback("often"),
            "`T` has to be .*at least 1 or \"auto\", but got 'often'",
        ),
        (lambda: KnowledgeRefreshCallback(0), "`T` has to be an integer of at least 1 or"),
        (lambda: AutoPeriod(max_drift=0), "`max_drift` has to be positive"),
        (lambda: AutoPeriod(max_share=0), "`max_share` has to be positive"),
        (lambda: AutoPeriod(max_share=1.5), r"`max_share` has to be in \[0, 1\]"),
    ],
)
def test_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make()
