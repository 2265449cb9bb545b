"""The terms of the loss are logged where they are read, with the values that they have in each step."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

from ask_lightning import ASKModule
from ask_lightning.callbacks import loss_terms
from ask_lightning.losses import NTXentLoss, ReliabilityOTLoss
from tests.helpers.clients import MemoryLogger, PlainTowers, make_loader, make_refresh, make_trainer

LOSSES = {"with a refresh": lambda: ReliabilityOTLoss(num_neighbors=3), "without": NTXentLoss}


class Calls(pl.Callback):
    """The steps after which the terms were logged, and the losses of all steps."""

    def __init__(self, module):
        self.steps, self.losses = [], []
        original = module.log_dict

        def spied(values, **options):
            if "ask/loss" in values:
                self.steps.append(len(self.losses))
            original(values, **options)

        vars(module)["log_dict"] = spied

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def run(loss="with a refresh", callbacks=(), **settings):
    """Two epochs of six steps; what was called, logged, and left in the end."""
    pl.seed_everything(0, verbose=False)
    module, logger = ASKModule(PlainTowers(), LOSSES[loss]()), MemoryLogger()
    calls = Calls(module)
    refresh = [make_refresh()] if module.loss.needs_knowledge else []
    settings = {"max_epochs": 2, "log_every_n_steps": 4} | settings
    fit = make_trainer(callbacks=[*refresh, *callbacks, calls], logger=logger, **settings)
    fit.fit(module, make_loader())
    rows = [(step, row) for step, row in logger.rows if "ask/loss" in row]
    return calls, rows, float(fit.callback_metrics["ask/loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_log_is_that_of_a_run_which_logs_every_step(loss, accumulate, monkeypatch):
    settings = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 4 // accumulate}
    calls, rows, last = run(loss, **settings)
    assert [step for step, _ in rows] == [number // accumulate - 1 for number in (4, 8, 12)]
    assert len(calls.steps) < len(calls.losses)
    monkeypatch.setattr(loss_terms, "_is_read", lambda trainer: True)
    all_calls, all_rows, all_last = run(loss, **settings)
    assert len(all_calls.steps) == len(all_calls.losses) == 12
    assert rows == all_rows
    assert last == all_last == pytest.approx(calls.losses[-1] * accumulate)


def test_the_last_batch_of_an_epoch_is_logged():
    calls, _, _ = run()
    assert calls.steps == [3, 5, 7, 11]


@pytest.mark.parametrize(
    "reader", [EarlyStopping("ask/loss", check_on_train_epoch_end=True, patience=9), Timer("00:01:00:00")]
)
def test_every_step_is_logged_for_a_callback_that_may_read_it(reader):
    assert len(run(callbacks=[reader])[0].steps) == 12


def test_a_schedule_reads_every_step():
    class Client(PlainTowers):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            settings = {"scheduler": schedule, "monitor": "ask/loss", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": settings}

    module = ASKModule(Client(), NTXentLoss())
    calls = Calls(module)
    make_trainer(max_epochs=1, callbacks=[calls], logger=MemoryLogger()).fit(module, make_loader())
    assert len(calls.steps) == 6


def test_every_step_is_logged_where_lightning_does_not_say_which_it_reads(monkeypatch):
    class Silent:
        """A connector without the property."""

    trainer = make_trainer()
    assert not hasattr(Silent(), "should_update_logs")
    assert hasattr(_LoggerConnector, "should_update_logs"), "which decides with this version"
    monkeypatch.setattr(trainer, "_logger_connector", Silent())
    assert loss_terms._is_read(trainer)


class Namesake(PlainTowers):
    """Logs under a name of ASK's, in the hook that it is told."""

    def __init__(self, hook: str, name: str) -> None:
        super().__init__()
        self.hook, self.name = hook, name

    def log_in(self, hook: str) -> None:
        if hook == self.hook:
            self.log(self.name, torch.tensor(100.0))

    def training_step(self, batch, batch_idx):
        self.log_in("training_step")
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        self.log_in("on_train_batch_end")

    def on_train_epoch_start(self) -> None:
        self.log_in("on_train_epoch_start")


@pytest.mark.parametrize(
    ("loss", "hook", "name"),
    [
        *((loss, hook, "ask/loss") for loss in LOSSES for hook in ("training_step", "on_train_batch_end")),
        ("with a refresh", "on_train_epoch_start", "ask/knowledge_age"),
        ("with a refresh", "training_step", "ask/own"),
        ("without", "", ""),
    ],
)
def test_a_name_that_the_model_logs_as_well_is_pointed_at_once(loss, hook, name, recwarn):
    module = ASKModule(Namesake(hook, name), LOSSES[loss]())
    refresh = [make_refresh()] if module.loss.needs_knowledge else []
    run = make_trainer(callbacks=refresh, logger=MemoryLogger(), max_epochs=2, log_every_n_steps=2)
    run.fit(module, make_loader())
    told = [str(each.message) for each in recwarn if "by ASK under the same name" in str(each.message)]
    expected = name not in ("ask/own", "")
    assert [text.split(" by the model")[0] for text in told] == [f"`{name}` is logged in `{hook}`"] * expected


@pytest.mark.parametrize("loss", LOSSES)
def test_callbacks_behind_the_refresh_and_the_model_read_the_terms_of_the_step(loss):
    class Reader(pl.Callback):
        def __init__(self):
            self.read = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.read.append((outputs["loss"].item(), pl_module.loss.last["loss"].item()))

    reader = Reader()
    run(loss, [reader])
    assert len(reader.read) == 12
    assert all(returned == term for returned, term in reader.read)


def test_a_step_that_is_left_out_has_no_terms():
    """Neither for callbacks nor for the log, which would show those of the step before it."""

    class Skipping(PlainTowers):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None

    class Reader(pl.Callback):
        def __init__(self):
            self.read = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.read.append(bool(pl_module.loss.last))

    reader, logger = Reader(), MemoryLogger()
    module = ASKModule(Skipping(), LOSSES["with a refresh"]())
    fit = make_trainer(callbacks=[make_refresh(), reader], logger=logger, max_epochs=1, log_every_n_steps=1)
    fit.fit(module, make_loader())
    assert reader.read == [True, False] * 3
