"""Copies of an `ASKModule`: deepcopy, pickle, weight averaging, state dicts, tuners."""

import copy
import io
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn

from ask_lightning import ASKModule
from tests.helpers.clients import (
    NEUTRAL,
    FrozenClient,
    InlineClient,
    PlainTowers,
    RestlessTowers,
    Watcher,
    assert_same_weights,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    static_knowledge,
    wrap,
)

WeightAveraging = getattr(pl.callbacks, "WeightAveraging", None)
EMAWeightAveraging = getattr(pl.callbacks, "EMAWeightAveraging", None)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_torch_save]


@pytest.mark.parametrize(
    ("client", "duplicate"),
    # FrozenClient's average holds a local function of torch, which does not pickle.
    [*((InlineClient, duplicate) for duplicate in COPIES), (FrozenClient, copy.deepcopy)],
)
def test_copy_is_equal_and_independent(client, duplicate):
    pl.seed_everything(0, verbose=False)
    module = wrap(client())
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader(), held_out())
    twin = duplicate(module)
    assert isinstance(twin, ASKModule)
    assert_same_weights(twin, module)
    assert twin.loss.options == module.loss.options
    assert twin.loss.knowledge.fingerprint == module.loss.knowledge.fingerprint
    assert twin.hparams == module.hparams

    weights = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(twin, make_loader(), held_out())
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items()), (
        "hooks of the copy work on the copy"
    )
    assert not torch.equal(twin.model.audio_encoder.weight, module.model.audio_encoder.weight)


@pytest.mark.parametrize("duplicate", COPIES)
def test_copy_before_training(duplicate):
    twin = duplicate(wrap(PlainTowers()))
    watcher = Watcher()
    make_trainer(max_epochs=1, callbacks=[make_refresh(), watcher]).fit(twin, make_loader())
    assert len(watcher.losses) == 6


def test_copy_of_a_model_that_has_its_own_way_to_be_copied():
    class Client(PlainTowers):
        def __deepcopy__(self, memo):
            twin = Client()
            twin.load_state_dict(self.state_dict())
            return twin

    module = wrap(Client())
    twin = copy.deepcopy(module)
    assert isinstance(twin, ASKModule)
    assert isinstance(twin.model, Client)
    assert twin.model is not module.model


def test_learnable_temperature_of_a_copy_is_the_copys():
    model = InlineClient()
    module = wrap(model, {"temperature": model.logit_scale})
    twin = copy.deepcopy(module)
    assert twin.loss.temperature is twin.model.logit_scale
    assert twin.loss.temperature is not model.logit_scale


def inverse_scale(model):
    return 1 / model.logit_scale.exp()


class NamedTemperature(InlineClient):
    @property
    def tau(self):
        return 1 / self.logit_scale.exp()


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("temperature", [inverse_scale, "tau"])
def test_temperature_read_from_the_model_is_the_copys(duplicate, temperature):
    model = NamedTemperature()
    twin = duplicate(wrap(model, {"temperature": temperature}))
    before = model.logit_scale.item()
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(twin, make_loader())
    assert model.logit_scale.item() == before
    assert twin.model.logit_scale.item() != before
    assert twin.loss.temperature.item() == pytest.approx(1 / twin.model.logit_scale.exp().item())


@pytest.mark.skipif(WeightAveraging is None, reason="this Lightning has no WeightAveraging")
@pytest.mark.parametrize("client", [PlainTowers, RestlessTowers])
def test_weight_averaging_is_that_of_the_plain_run(client, tmp_path):
    def fit(ask, max_epochs=4, path=None, directory=None):
        pl.seed_everything(0, verbose=False)
        model = client()
        average = WeightAveraging(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
        keep = ModelCheckpoint(directory, save_last=True)
        callbacks = [average, *([make_refresh(2)] if ask else []), keep]
        run = make_trainer(max_epochs=max_epochs, callbacks=callbacks, enable_checkpointing=True)
        run.fit(wrap(model, NEUTRAL) if ask else model, make_loader(), held_out(), ckpt_path=path)
        return model

    plain = fit(ask=False, directory=tmp_path / "plain")
    model = fit(ask=True, directory=tmp_path / "ask")
    assert_same_weights(model, plain)
    last = torch.load(tmp_path / "ask" / "last.ckpt", weights_only=True)
    assert list(last["state_dict"]) == list(plain.state_dict())
    assert list(last["current_model_state"]) == list(plain.state_dict())
    plain_last = torch.load(tmp_path / "plain" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        for name, value in plain_last[part].items():
            assert torch.equal(last[part][name], value), (part, name)

    resumed_plain = fit(False, 6, tmp_path / "plain" / "last.ckpt", tmp_path / "plain2")
    resumed = fit(True, 6, tmp_path / "ask" / "last.ckpt", tmp_path / "ask2")
    assert_same_weights(resumed, resumed_plain)
    alone = client.load_from_checkpoint(tmp_path / "ask" / "last.ckpt")
    assert list(alone.state_dict()) == list(plain.state_dict())


@pytest.mark.skipif(EMAWeightAveraging is None, reason="this Lightning has no EMAWeightAveraging")
def test_ema_weight_averaging_with_knowledge():
    pl.seed_everything(0, verbose=False)
    module, watcher = wrap(PlainTowers()), Watcher()
    run = make_trainer(callbacks=[EMAWeightAveraging(decay=0.5), make_refresh(1), watcher])
    run.fit(module, make_loader(), held_out())
    assert len(set(watcher.knowledge)) == 3


def test_stochastic_weight_averaging():
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    def fit(ask):
        pl.seed_everything(0, verbose=False)
        model = PlainTowers()
        swa = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2)
        run = make_trainer(max_epochs=4, callbacks=[swa, *([make_refresh(2)] if ask else [])])
        run.fit(wrap(model, NEUTRAL) if ask else model, make_loader())
        return model

    assert_same_weights(fit(ask=True), fit(ask=False))


def test_state_dict_override_without_arguments():
    """Lightning's documented way to leave a frozen encoder out of checkpoints."""

    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

        def state_dict(self):
            return {name: value for name, value in super().state_dict().items() if "text" not in name}

    module = wrap(Client())
    assert list(module.state_dict()) == ["audio_encoder.weight", "audio_encoder.bias"]
    other = wrap(Client())
    other.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(other.audio_encoder.weight, module.audio_encoder.weight)


def test_state_dict_override_in_a_run(tmp_path):
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.strict_loading = False

        def state_dict(self):
            return {name: value for name, value in super().state_dict().items() if "text" not in name}

    module = wrap(Client())
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(stored["state_dict"]) == ["audio_encoder.weight", "audio_encoder.bias"]
    again = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", Client())
    assert torch.equal(again.model.audio_encoder.weight, module.model.audio_encoder.weight)
    make_trainer(max_epochs=2, callbacks=[make_refresh()]).fit(
        module, make_loader(), ckpt_path=tmp_path / "a.ckpt"
    )


def test_load_state_dict_override():
    class Client(PlainTowers):
        """Accepts weights under the names of an older version."""

        def load_state_dict(self, state_dict, *args, **kwargs):
            renamed = {name.replace("old_", ""): value for name, value in state_dict.items()}
            return super().load_state_dict(renamed, *args, **kwargs)

    old = {f"old_{name}": value for name, value in PlainTowers().state_dict().items()}
    module = wrap(Client())
    module.load_state_dict(old)
    assert torch.equal(module.model.text_encoder.bias, old["old_text_encoder.bias"])


class Nested(PlainTowers):
    """Weights `scale` and `model.scale`: the name `model` is the wrapper's, too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.model = nn.Module()
        self.model.scale = nn.Parameter(torch.tensor(2.0))
        self.model.model = nn.Linear(2, 2)


def test_weights_of_equal_names_at_two_depths():
    module = wrap(Nested())
    stored = {name: value.clone() for name, value in module.state_dict().items()}
    assert list(stored) == list(Nested().state_dict())
    fresh = wrap(Nested())
    nn.init.constant_(fresh.model.scale, -1)
    nn.init.constant_(fresh.model.model.scale, -1)
    fresh.load_state_dict(stored)
    assert (fresh.model.scale.item(), fresh.model.model.scale.item()) == (1.0, 2.0)


def test_inside_another_module():
    """As in averages and containers, which load weights through submodules."""

    class Loss(nn.Module):
        def __init__(self, scorer):
            super().__init__()
            self.scorer = scorer

    class Client(Nested):
        pass

    model = Client()
    outer = nn.ModuleDict({"ask": wrap(model, {"interaction": None}), "other": nn.Linear(1, 1)})
    stored = {name: value.clone() for name, value in outer.state_dict().items()}
    names = {f"ask.{name}" for name in model.state_dict()} | {"other.weight", "other.bias"}
    assert set(stored) == names
    fresh = nn.ModuleDict({"ask": wrap(Client()), "other": nn.Linear(1, 1)})
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, -1)
    fresh.load_state_dict(stored)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, stored[name]), name


def test_loss_that_shares_a_submodule_with_the_model():
    """A learned interaction is the model's; the checkpoint holds it once, under the model's name."""

    class Interaction(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))

        def forward(self, text, audio):
            return text @ self.weight @ audio.T

    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.interaction = Interaction()

    model = Client()
    module = wrap(model, {"interaction": model.interaction})
    assert list(module.state_dict()) == list(Client().state_dict())
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert not torch.equal(model.interaction.weight, torch.eye(8)), "it is trained"
    other = Client()
    fresh = wrap(other, {"interaction": other.interaction})
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.loss.interaction.weight, model.interaction.weight)
    outer = nn.ModuleList([copy.deepcopy(fresh)])
    outer.load_state_dict(outer.state_dict())


@pytest.mark.parametrize("where", ["attribute", "hyperparameter"])
def test_learning_rate_finder_with_a_base_of_ones_own(where, tmp_path):
    class Client(PlainTowers):
        def __init__(self, lr: float = 1e-5) -> None:
            super().__init__()
            self.save_hyperparameters()
            if where == "attribute":
                self.lr = lr

        def configure_optimizers(self):
            rate = self.lr if where == "attribute" else self.hparams.lr
            return torch.optim.SGD(self.parameters(), lr=rate)

    pl.seed_everything(0, verbose=False)
    model = Client()
    module = wrap(model)
    module.loss.knowledge = static_knowledge(model)
    run = make_trainer(max_epochs=10, default_root_dir=tmp_path)
    found = Tuner(run).lr_find(module, make_loader(), num_training=20, max_lr=10.0)
    suggestion = found.suggestion()
    assert suggestion is not None
    assert (model.lr if where == "attribute" else model.hparams.lr) == suggestion


@pytest.mark.parametrize(
    ("tool", "finder"), [("lr_find", "LearningRateFinder"), ("scale_batch_size", "BatchSizeFinder")]
)
def test_tuners_beside_the_callback_are_refused(tool, finder, tmp_path):
    """They take the trainer's other callbacks off while they search, so there would be no knowledge."""

    class Client(PlainTowers):
        lr, batch_size = 1e-3, 4

        def train_dataloader(self):
            return make_loader(batch_size=self.batch_size)

    run = make_trainer(max_epochs=1, callbacks=[make_refresh()], default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match=rf"{finder} disables all other callbacks .* Tuner\(Trainer"):
        getattr(Tuner(run), tool)(wrap(Client()))


def test_learning_rate_finder_on_the_model_before_training_with_ask(tmp_path):
    """The way that the refusal recommends: the wrapper shares its model."""

    class Client(PlainTowers):
        lr = 1e-5

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = wrap(Client())
    quiet = make_trainer(max_epochs=10, default_root_dir=tmp_path)
    found = Tuner(quiet).lr_find(module.model, make_loader(), num_training=20, max_lr=10.0)
    watcher = Watcher()
    make_trainer(max_epochs=1, callbacks=[make_refresh(), watcher]).fit(module, make_loader())
    assert watcher.rates[0] == [found.suggestion()]
