"""With λ_f = λ_c = ρ = β = 0 and one granularity, training under ASK is plain training, bit for bit."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.clients import (
    NEUTRAL,
    FrozenClient,
    InlineClient,
    MemoryLogger,
    Pairs,
    PlainTowers,
    RestlessTowers,
    SelfContained,
    Watcher,
    assert_same_weights,
    held_out,
    make_refresh,
    make_trainer,
    static_knowledge,
    wrap,
)


class Augmented(Pairs):
    """Each reading draws from the three random streams of its process."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        item = super().__getitem__(row)
        noise = random.random() + np.random.random() + torch.rand(())  # noqa: NPY002
        return item | {"audio": item["audio"] + 0.1 * noise}


def streams() -> tuple:
    """States of all global random streams of this process, as comparable values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def fit(client, *, ask: bool, num_workers: int = 0, step: str = "auto", T: int = 1, **settings):
    pl.seed_everything(11, verbose=False)
    model = client()
    data = DataLoader(Augmented(), 8, shuffle=True, drop_last=True, num_workers=num_workers)
    watcher, logger = Watcher(), MemoryLogger()
    callbacks = [watcher, *([make_refresh(T)] if ask else [])]
    run = make_trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1, **settings)
    run.fit(wrap(model, NEUTRAL, step=step) if ask else model, data, held_out())
    return model, watcher, logger, streams()


@pytest.mark.parametrize(
    ("client", "num_workers"), [(PlainTowers, 0), (FrozenClient, 0), (RestlessTowers, 0), (RestlessTowers, 2)]
)
def test_weights_batches_and_logs_of_the_plain_run(client, num_workers):
    plain, before, logged_before, streams_before = fit(client, ask=False, num_workers=num_workers)
    model, after, logged, streams_after = fit(client, ask=True, num_workers=num_workers)
    assert_same_weights(model, plain)
    assert after.clips == before.clips
    assert after.losses == before.losses
    assert after.rates == before.rates
    assert after.metrics == before.metrics
    assert logged.own_rows == logged_before.own_rows
    assert streams_after == streams_before
    assert {name: part.training for name, part in model.named_modules()} == {
        name: part.training for name, part in plain.named_modules()
    }


def test_encode_mode_is_neutral_too():
    plain, before, _, streams_before = fit(PlainTowers, ask=False)
    model, after, _, streams_after = fit(PlainTowers, ask=True, step="encode")
    assert_same_weights(model, plain)
    assert after.losses == before.losses
    assert streams_after == streams_before


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"overfit_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"num_sanity_val_steps": 2},
        {"max_epochs": 1, "max_steps": 4},
        {"fast_dev_run": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore:.*overfit")
def test_neutral_under_trainer_settings(settings):
    plain, before, logged_before, streams_before = fit(RestlessTowers, ask=False, **settings)
    model, after, logged, streams_after = fit(RestlessTowers, ask=True, **settings)
    assert_same_weights(model, plain)
    assert after.clips == before.clips
    assert logged.own_rows == logged_before.own_rows
    assert streams_after == streams_before


def test_ask_itself_is_not_neutral():
    """The comparison above can fail: with the paper's settings the weights differ."""
    pl.seed_everything(11, verbose=False)
    model = PlainTowers()
    data = DataLoader(Augmented(), 8, shuffle=True, drop_last=True)
    watcher = Watcher()
    make_trainer(callbacks=[make_refresh(1), watcher]).fit(wrap(model), data)
    plain, before, _, _ = fit(PlainTowers, ask=False)
    assert watcher.clips == before.clips, "the batches are the same all the same"
    assert not torch.equal(model.audio_encoder.weight, plain.audio_encoder.weight)


def test_two_refreshed_runs_are_equal():
    runs = []
    for _ in range(2):
        pl.seed_everything(5, verbose=False)
        model, watcher = RestlessTowers(), Watcher()
        data = DataLoader(Augmented(), 8, shuffle=True)
        make_trainer(callbacks=[make_refresh(1), watcher]).fit(wrap(model), data)
        runs.append((model, watcher))
    assert_same_weights(runs[0][0], runs[1][0])
    assert runs[0][1].losses == runs[1][1].losses
    assert runs[0][1].knowledge == runs[1][1].knowledge


def test_how_often_knowledge_is_renewed_does_not_move_the_streams():
    ends = set()
    for T in (1, 3):
        *_, end = fit(RestlessTowers, ask=True, T=T)
        ends.add(end)
    assert len(ends) == 1


def test_schedule_and_temperature_inside_the_step():
    """The inline loss rounds in another order; in float64 that hardly shows."""

    def fit(ask):
        pl.seed_everything(11, verbose=False)
        model, watcher = InlineClient(), Watcher()
        temperature = {"temperature": lambda model: 1 / model.logit_scale.exp()}
        module = wrap(model, NEUTRAL | temperature) if ask else model
        run = make_trainer(callbacks=[watcher, *([make_refresh(1)] if ask else [])], precision="64-true")
        run.fit(module, DataLoader(Augmented(), 8, shuffle=True), held_out())
        return model, watcher

    (plain, before), (model, after) = fit(ask=False), fit(ask=True)
    assert after.rates == before.rates
    assert after.clips == before.clips
    assert after.losses == pytest.approx(before.losses, rel=1e-9)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.allclose(theirs, rtol=1e-9, atol=1e-9)


def test_mixed_precision_differs_only_by_the_losss_own_float32():
    class Float32Loss(PlainTowers):
        def contrast(self, audio, text):
            with torch.autocast("cpu", enabled=False):
                return super().contrast(audio.float(), text.float())

    plain, before, _, _ = fit(Float32Loss, ask=False, precision="bf16-mixed")
    model, after, _, _ = fit(Float32Loss, ask=True, precision="bf16-mixed")
    assert after.losses == before.losses
    assert_same_weights(model, plain)


def test_module_without_the_wrapper_is_neutral():
    class Client(SelfContained):
        validation_step = pl.LightningModule.validation_step

    plain, before, _, _ = fit(PlainTowers, ask=False)
    pl.seed_everything(11, verbose=False)
    model, watcher = Client(**NEUTRAL), Watcher()
    data = DataLoader(Augmented(), 8, shuffle=True, drop_last=True)
    make_trainer(callbacks=[make_refresh(1), watcher]).fit(model, data)
    assert watcher.losses == before.losses
    assert_same_weights(model, plain)


def test_no_buffers_and_no_parameters_are_added():
    model = RestlessTowers()
    module = wrap(model)
    module.loss.knowledge = static_knowledge(PlainTowers())
    assert [id(p) for p in module.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in module.buffers()] == [id(b) for b in model.buffers()]
    assert list(module.state_dict()) == list(model.state_dict())
