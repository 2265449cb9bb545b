"""Ways to take the embeddings out of models that were written without ASK: capture, criterion, encode."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ask_lightning import ASKModule, ReliabilityOTLoss
from ask_lightning.losses import MomentumContrastLoss
from tests.helpers.clients import (
    AUDIO,
    NEUTRAL,
    WIDTH,
    CriterionClient,
    FrozenClient,
    InlineClient,
    MemoryLogger,
    Pairs,
    PlainTowers,
    Towers,
    Watcher,
    assert_same_weights,
    make_loader,
    make_refresh,
    make_trainer,
    static_knowledge,
    wrap,
)


def fit(model, *, ask: bool, seed: int = 3, epochs: int = 3, settings=None, **options):
    """Train a client, plain or wrapped, and return what was seen."""
    pl.seed_everything(seed, verbose=False)
    model = model()
    watcher, logger = Watcher(), MemoryLogger()
    module = wrap(model, settings, **options) if ask else model
    callbacks = [watcher, make_refresh(2)] if ask else [watcher]
    run = make_trainer(max_epochs=epochs, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    run.fit(module, make_loader())
    return model, watcher, logger, run


def test_capture_keeps_the_models_own_schedule_and_log():
    plain, before, logged_before, _ = fit(InlineClient, ask=False)
    model, after, logged, _ = fit(InlineClient, ask=True)
    assert after.rates == before.rates
    assert model.seen_rates == plain.seen_rates
    assert len(set(model.seen_rates)) == 10, "the warm-up runs inside the step"
    assert [set(row) for _, row in logged.own_rows] == [set(row) for _, row in logged_before.own_rows]
    assert [step for step, _ in logged.own_rows] == [step for step, _ in logged_before.own_rows]
    first, first_before = logged.values("train/loss")[0], logged_before.values("train/loss")[0]
    assert first == first_before, "the model logs its own loss, which is equal as long as the weights are"
    assert after.losses != before.losses
    assert not torch.equal(model.audio_encoder.weight, plain.audio_encoder.weight)


def test_capture_returns_the_models_dictionary_with_another_loss():
    model = InlineClient()
    module = wrap(model)
    module.loss.knowledge = static_knowledge(model)
    returned = []

    class Catch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            returned.append(outputs)

    make_trainer(max_steps=1, max_epochs=1, callbacks=[Catch()]).fit(module, make_loader())
    assert set(returned[0]) == {"loss", "scale"}


def test_capture_trains_with_the_loss_of_the_captured_embeddings():
    pl.seed_everything(0, verbose=False)
    model = InlineClient()
    module = wrap(model)
    base = module.loss.knowledge = static_knowledge(model)
    batch = next(iter(make_loader()))
    expected = module.loss(model.encode_audio(batch), model.encode_text(batch), knowledge=base)
    watcher = Watcher()
    make_trainer(max_epochs=1, limit_train_batches=1, callbacks=[watcher]).fit(module, make_loader())
    assert watcher.losses == [expected.item()]


def test_learnable_temperature_of_the_model_is_trained():
    pl.seed_everything(0, verbose=False)
    model = InlineClient()
    before = model.logit_scale.item()
    module = wrap(model, {"temperature": lambda model: 1 / model.logit_scale.exp()})
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    assert model.logit_scale.item() != before


def test_criterion_keeps_the_auxiliary_loss():
    plain, before, logged_before, _ = fit(CriterionClient, ask=False)
    model, after, logged, _ = fit(CriterionClient, ask=True, criterion="loss_fn")
    assert logged.values("train/auxiliary")[0] == logged_before.values("train/auxiliary")[0]
    assert after.rates == before.rates
    neutral, _, _, _ = fit(CriterionClient, ask=True, criterion="loss_fn", settings=NEUTRAL)
    assert_same_weights(neutral, plain)
    assert not torch.equal(model.audio_encoder.weight, plain.audio_encoder.weight)
    assert type(model.loss_fn).__name__ == "ContrastiveLoss", "it is replaced only while the step runs"


def test_criterion_value_is_ask_plus_auxiliary():
    pl.seed_everything(0, verbose=False)
    model = CriterionClient()
    module = wrap(model, criterion="loss_fn")
    base = module.loss.knowledge = static_knowledge(model)
    batch = next(iter(make_loader()))
    audio, text = model.encode_audio(batch), model.encode_text(batch)
    auxiliary = 1e-2 * (audio.norm(dim=1) - 1).square().mean()
    expected = module.loss(audio, text, knowledge=base) + auxiliary
    watcher = Watcher()
    make_trainer(max_epochs=1, limit_train_batches=1, callbacks=[watcher]).fit(module, make_loader())
    assert watcher.losses == [expected.item()]


def test_a_criterion_that_trains_nothing_is_told():
    class Measuring(CriterionClient):
        def training_step(self, batch, batch_idx):
            audio, text = self.encode_audio(batch), self.encode_text(batch)
            with torch.no_grad():
                self.loss_fn(audio, text)
            return self.contrast(audio, text)

    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    with pytest.warns(UserWarning, match=r"calls `self.loss_fn` without gradients.*criterion=\.\.\.\)"):
        run.fit(wrap(Measuring(), criterion="loss_fn"), make_loader())


def test_criterion_keeps_its_attributes_while_it_is_replaced():
    """`self.log("temperature", self.loss_fn.temperature)` beside `self.loss_fn(...)`."""

    class Temperature(nn.Module):
        temperature = 0.5

        def forward(self, audio, text):
            raise AssertionError("replaced")

    class Client(Towers):
        def __init__(self):
            super().__init__()
            self.loss_fn = Temperature()

        def training_step(self, batch, batch_idx):
            self.log("temperature", self.loss_fn.temperature)
            return self.loss_fn(self.encode_audio(batch), self.encode_text(batch))

    _, _, logged, _ = fit(Client, ask=True, criterion="loss_fn", epochs=1)
    assert logged.values("temperature") == [0.5] * 6


def test_captured_submodule_keeps_its_attributes():
    """An encoder named as audio method may be a submodule that the step also looks into."""

    class Encoder(nn.Module):
        def __init__(self, key, width):
            super().__init__()
            self.key, self.projection = key, nn.Linear(width, WIDTH)

        def forward(self, batch):
            return self.projection(batch[self.key])

    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.listener = Encoder("audio", AUDIO)

        def training_step(self, batch, batch_idx):
            self.log("norm", self.listener.projection.weight.norm())
            return self.contrast(self.listener(batch), self.encode_text(batch))

    model, _, logged, _ = fit(Client, ask=True, audio="listener", epochs=1)
    assert len(logged.values("norm")) == 6
    assert isinstance(model.listener, Encoder)


def test_encode_leaves_the_step_out():
    class Client(PlainTowers):
        def training_step(self, batch, batch_idx):
            raise AssertionError("left out")

    _, watcher, _, _ = fit(Client, ask=True, step="encode")
    assert len(watcher.losses) == 18


def test_encode_with_callables_instead_of_methods():
    class Client(pl.LightningModule):
        """Takes tensors, not batches, and has no training step."""

        def __init__(self):
            super().__init__()
            self.audio_encoder, self.text_encoder = nn.Linear(12, WIDTH), nn.Linear(10, WIDTH)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    pl.seed_everything(0, verbose=False)
    model = Client()
    module = wrap(
        model,
        audio=lambda model, batch: model.audio_encoder(batch["audio"]),
        text=lambda model, batch: model.text_encoder(batch["text"]),
    )
    assert module.ask_step == "encode"
    watcher = Watcher()
    make_trainer(callbacks=[make_refresh(), watcher]).fit(module, make_loader())
    assert sum(watcher.losses[-6:]) < sum(watcher.losses[:6])


def test_frozen_client_keeps_what_is_frozen():
    """Batch norm in evaluation mode, dropout, an EMA copy, parameter groups, a schedule."""
    plain, before, _, _ = fit(FrozenClient, ask=False, epochs=5)
    model, after, _, _ = fit(FrozenClient, ask=True, epochs=5)
    assert after.rates == before.rates
    assert len({tuple(rates) for rates in after.rates}) == 3, "the schedule has steps of two epochs"
    assert not model.norm.training
    assert torch.equal(model.norm.running_mean, torch.zeros(AUDIO))
    assert model.average.n_averaged == plain.average.n_averaged == 30
    neutral, _, _, _ = fit(FrozenClient, ask=True, epochs=5, settings=NEUTRAL)
    assert_same_weights(neutral, plain)


@pytest.mark.parametrize("step", ["capture", "encode"])
def test_training_lowers_the_loss(step):
    _, watcher, logged, _ = fit(PlainTowers, ask=True, step=step, epochs=8)
    assert sum(watcher.losses[-6:]) < 0.8 * sum(watcher.losses[:6])
    assert logged.values("ask/loss") == watcher.losses


def test_step_without_batch_idx():
    class Client(Towers):
        def training_step(self, batch):
            return self.contrast(self.encode_audio(batch), self.encode_text(batch))

    _, watcher, _, _ = fit(Client, ask=True, epochs=1)
    assert len(watcher.losses) == 6


def test_step_that_skips_batches():
    class Client(PlainTowers):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class Count(pl.Callback):
        """Optimiser steps that changed a weight."""

        def __init__(self):
            self.changed = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = pl_module.audio_encoder.weight.clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.changed.append(not torch.equal(self.before, pl_module.audio_encoder.weight))

    pl.seed_everything(0, verbose=False)
    count = Count()
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(), count])
    run.fit(wrap(Client()), make_loader())
    assert count.changed == [True, False] * 3


def test_ids_reach_the_loss():
    class Client(PlainTowers):
        pass

    pl.seed_everything(0, verbose=False)
    for ids in ("clip_id", lambda model, batch: batch["clip_id"]):
        module = wrap(Client(), {"exclude_self": True, "positives": "ids"}, ids=ids)
        run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
        run.fit(module, make_loader(captions_per_clip=2))
        assert torch.equal(module.loss.knowledge.ids, torch.arange(48) // 2)


def test_embeddings_need_not_be_normalised_or_of_float32():
    class Client(PlainTowers):
        def encode_audio(self, batch):
            return 100 * super().encode_audio(batch)

        def encode_text(self, batch):
            return F.normalize(super().encode_text(batch), dim=1)

    _, watcher, _, _ = fit(Client, ask=True, epochs=1)
    assert all(loss == loss for loss in watcher.losses)


def test_default_loss_is_the_papers():
    module = ASKModule(PlainTowers())
    assert module.loss.options == ReliabilityOTLoss().options
    assert module.loss.options["num_neighbors"] == 10


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("method", ["encode_audio", "encode_text"])
def test_captured_method_called_not_once(method, count):
    class Client(Towers):
        def training_step(self, batch, batch_idx):
            other = self.encode_text(batch) if method == "encode_audio" else self.encode_audio(batch)
            mine = [getattr(self, method)(batch) for _ in range(count)] or [torch.randn_like(other)]
            return self.contrast(other, sum(mine))

    with pytest.raises(
        RuntimeError,
        match=rf'step="capture" needs `Client.training_step` to call `self.{method}` once, but it was called '
        rf'{count} times. Use ASKModule\(..., step="encode"\)',
    ):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client()), make_loader())


def test_the_remedy_in_that_message_works():
    class Client(Towers):
        def training_step(self, batch, batch_idx):
            return self.contrast(self.encode_audio(batch), self.encode_text(batch) + self.encode_text(batch))

    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(Client(), step="encode"), make_loader())


@pytest.mark.parametrize("count", [0, 2])
def test_criterion_called_not_once(count):
    class Client(CriterionClient):
        def training_step(self, batch, batch_idx):
            audio, text = self.encode_audio(batch), self.encode_text(batch)
            return audio.mean() + sum(self.loss_fn(audio, text) for _ in range(count))

    with pytest.raises(
        RuntimeError, match=rf"needs `Client.training_step` to call .* once, but it was called {count} times"
    ):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client(), criterion="loss_fn"), make_loader())


def test_criterion_called_with_something_else():
    class Client(CriterionClient):
        def training_step(self, batch, batch_idx):
            return self.loss_fn(self.encode_audio(batch), text=self.encode_text(batch))

    with pytest.raises(
        TypeError, match=r"called with 1 positional and \['text'\] named .* pass criterion=\"contrast\""
    ):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client(), criterion="loss_fn"), make_loader())


def test_after_an_error_inside_the_step_the_model_is_whole():
    class Client(CriterionClient):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    for options in ({"criterion": "loss_fn"}, {}):
        model = Client()
        names = set(vars(model))
        module = wrap(model, **options)
        with pytest.raises(ZeroDivisionError):
            make_trainer(callbacks=[make_refresh()]).fit(module, make_loader())
        assert set(vars(model)) == names
        assert type(model.loss_fn).__name__ == "ContrastiveLoss"


def test_method_replaced_on_the_instance_is_found_again():
    """Someone else's patch on the instance survives the capture."""
    model = PlainTowers()
    patched = model.encode_audio = lambda batch: model.audio_encoder(batch["audio"])
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(model), make_loader())
    assert model.encode_audio is patched


@pytest.mark.parametrize("criterion", ["missing", "some_number"])
def test_missing_criterion(criterion):
    class Client(CriterionClient):
        some_number = 3

    with pytest.raises(ValueError, match=rf"Argument `criterion`.*Client has no callable '{criterion}'"):
        ASKModule(Client(), criterion=criterion)


def test_criterion_without_a_training_step():
    with pytest.raises(ValueError, match=r"Argument `criterion`.*Towers has no training_step"):
        ASKModule(Towers(), criterion="contrast")


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"`step` and `criterion` exclude each other.*Leave one out"):
        ASKModule(CriterionClient(), criterion="loss_fn", step="capture")


def test_the_criterion_may_be_named_twice():
    """What `.ask_step` says can be passed as `step`."""
    step = ASKModule(CriterionClient(), criterion="loss_fn").ask_step
    assert step == ASKModule(CriterionClient(), criterion="loss_fn", step=step).ask_step == "criterion"


def test_criterion_without_its_name():
    with pytest.raises(ValueError, match=r'step="criterion" needs the name of the attribute'):
        ASKModule(CriterionClient(), step="criterion")


def test_unknown_step():
    with pytest.raises(ValueError, match=r"Argument `step` has to be one of .*, but got 'catch'"):
        ASKModule(PlainTowers(), step="catch")


def test_capture_without_a_training_step():
    with pytest.raises(ValueError, match=r'needs a training_step, but Towers has none. Use step="encode"'):
        ASKModule(Towers(), step="capture")


def test_capture_needs_method_names():
    def encode(model, batch): ...

    with pytest.raises(ValueError, match=r"have to be method names, but got encode and encode_text"):
        ASKModule(PlainTowers(), audio=encode)


def test_step_that_fetches_batches_itself():
    class Client(Towers):
        def training_step(self, dataloader_iter): ...

    with pytest.raises(ValueError, match=r"Client.training_step takes `dataloader_iter`.*step=\"encode\""):
        ASKModule(Client())


class PartsClient(Towers):
    """Passes parts of its batch to its encoders."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def encode_audio(self, waveform):
        return self.audio_encoder(waveform)

    def encode_text(self, tokens, mask=None, *, scale):
        return self.text_encoder(tokens["ids"]) * scale

    def training_step(self, batch, batch_idx):
        audio = self.encode_audio(batch["audio"])
        text = self.encode_text(batch["tokens"], scale=2.0)
        self.steps += 1
        return self.contrast(audio, text)


class PartsPairs(Pairs):
    def __getitem__(self, row):
        item = super().__getitem__(row)
        return {"audio": item["audio"], "tokens": {"ids": item["text"]}, "clip_id": item["clip_id"]}


def test_encoders_that_take_parts_of_the_batch():
    """The refresh calls them as the training step does."""
    pl.seed_everything(0, verbose=False)
    model = PartsClient()
    module = wrap(model)
    with torch.no_grad():
        audio, text = model.audio_encoder(Pairs().audio), model.text_encoder(Pairs().text) * 2.0
    losses = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                assert pl_module.loss.knowledge.fine.audio.allclose(F.normalize(audio, dim=1), atol=1e-6)
                assert pl_module.loss.knowledge.fine.text.allclose(F.normalize(text, dim=1), atol=1e-6)
                assert model.steps == 0, "the step was left as soon as both had been called"

    run = make_trainer(callbacks=[make_refresh(1), Look()])
    run.fit(module, DataLoader(PartsPairs(), 8))
    assert sum(losses[-6:]) < sum(losses[:6])


class CountingClient(PartsClient):
    """Counts and schedules at the beginning of its step."""

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.seen = getattr(self, "seen", 0) + 1
        self.optimizers().param_groups[0]["lr"] *= 0.5
        return self.contrast(self.encode_audio(batch["audio"]), self.encode_text(batch["tokens"], scale=2.0))


def test_a_step_that_is_looked_at_does_not_count():
    model, watcher = CountingClient(), Watcher()
    run = make_trainer(max_epochs=1, callbacks=[make_refresh(), watcher])
    run.fit(wrap(model), DataLoader(PartsPairs(), 8))
    assert model.steps == model.seen == 6
    assert watcher.rates == [[1e-2 * 0.5**step] for step in range(1, 7)]


class NumberClient(Towers):
    """Passes a number to its audio encoder."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.refreshed_with = []

    def encode_audio(self, waveform, number):
        if not self.training:
            self.refreshed_with.append(number)
        return self.audio_encoder(waveform) * (1 + number)

    def encode_text(self, tokens):
        return self.text_encoder(tokens)

    def training_step(self, batch, batch_idx):
        number = self.number(self, batch)
        return self.contrast(self.encode_audio(batch["audio"], number), self.encode_text(batch["text"]))


def with_first_clip(items):
    """Collates, and adds a number that is another one in each batch."""
    batch = torch.utils.data.default_collate(items)
    return {**batch, "first": int(batch["clip_id"][0])}


def refresh_with_numbers(number, **settings):
    """The numbers with which two refreshes call the audio encoder; a batch that is looked at has it twice."""
    model = NumberClient(number)
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(1)], **settings)
    run.fit(wrap(model), DataLoader(Pairs(24), 8, collate_fn=with_first_clip))
    return model.refreshed_with


def test_a_number_of_the_batch_goes_to_the_encoder_of_each_batch():
    assert list(dict.fromkeys(refresh_with_numbers(lambda model, batch: batch["first"]))) == [0, 8, 16]


def test_a_number_that_follows_the_epoch_does_so_in_a_refresh():
    numbers = refresh_with_numbers(lambda model, batch: 0.5 + model.current_epoch)
    assert list(dict.fromkeys(numbers)) == [0.5, 1.5]


def test_a_number_that_follows_from_the_batch_in_an_unknown_way_is_refused():
    with pytest.raises(TypeError, match=r"`encode_audio\(batch\['audio'\], 0.5\)`.* for one batch and .*8.5"):
        refresh_with_numbers(lambda model, batch: float(batch["clip_id"][0]) + 0.5)


def test_encoders_that_take_parts_of_a_tuple():
    class Client(Towers):
        def encode_audio(self, waveform):
            return self.audio_encoder(waveform)

        def encode_text(self, tokens):
            return self.text_encoder(tokens)

        def training_step(self, batch, batch_idx):
            audio, text, _ = batch
            return self.contrast(self.encode_audio(audio), self.encode_text(text))

    data = torch.utils.data.TensorDataset(Pairs().audio, Pairs().text, Pairs().clip_id)
    module = wrap(Client(), {"positives": "ids"}, ids=2)
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, DataLoader(data, 8))
    assert module.loss.knowledge.ids.tolist() == list(range(48))


def test_encoders_that_take_what_the_step_makes_of_the_batch():
    class Client(PartsClient):
        def training_step(self, batch, batch_idx):
            audio = self.encode_audio(batch["audio"] * 2)
            return self.contrast(audio, self.encode_text(batch["tokens"], scale=1.0))

    with pytest.raises(
        TypeError,
        match=r"`encode_audio` and `encode_text` of Client were called with the batch, dict with the keys "
        r"\['audio', 'clip_id', 'tokens'\].*`Client.training_step` calls `encode_audio` with tensor \(8, 12\)"
        r".*no part of the batch.*audio=lambda model, batch: model.encode_audio",
    ):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client()), DataLoader(PartsPairs(), 8))


def test_encoders_that_take_parts_without_a_step_to_look_at():
    with pytest.raises(TypeError, match=r"were called with the batch.*Say how they are called: ASKModule"):
        make_trainer(callbacks=[make_refresh()]).fit(
            wrap(PartsClient(), step="encode"), DataLoader(PartsPairs(), 8)
        )


def test_an_encoders_own_error_stays_as_it_is():
    class Client(PlainTowers):
        def encode_audio(self, batch):
            return super().encode_audio({"sound": batch["audio"]})

    with pytest.raises(KeyError, match="audio"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client()), make_loader())


@pytest.mark.parametrize(
    ("client", "options"),
    [(PlainTowers, {}), (PlainTowers, {"step": "encode"}), (CriterionClient, {"criterion": "loss_fn"})],
)
def test_a_last_batch_of_one_is_survived(client, options):
    """The contrast of one pair is zero, as in plain training."""
    watcher = Watcher()
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(), watcher])
    with pytest.warns(
        UserWarning, match=r"single pair, which has nothing to be contrasted with.*drop_last"
    ) as seen:
        run.fit(wrap(client(), **options), DataLoader(Pairs(9), 8))
    assert len(watcher.losses) == 4
    if client is PlainTowers:
        assert watcher.losses[1] == watcher.losses[3] == 0
    assert watcher.losses[0] > 0
    assert sum("A batch holds a single pair" in str(each.message) for each in seen) == 1


def test_plain_training_with_a_last_batch_of_one_is_the_same():
    def train(ask):
        pl.seed_everything(0, verbose=False)
        model = PlainTowers()
        run = make_trainer(callbacks=[make_refresh(num_prototypes=2)] if ask else [])
        run.fit(wrap(model, NEUTRAL) if ask else model, DataLoader(Pairs(9), 8))
        return model

    assert_same_weights(train(True), train(False))


def test_keys_of_encoders_that_take_parts_of_the_batch():
    """A copy of the model encodes each batch; it is called as the training step calls the model."""
    watcher = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            watcher.append(float(outputs["loss"]))

    model = PartsClient()
    module = ASKModule(model, MomentumContrastLoss(0.1, 16, positives="diagonal"))
    make_trainer(max_epochs=1, callbacks=[Look()]).fit(module, DataLoader(PartsPairs(), 8))
    assert len(watcher) == model.steps == 6
    assert all(loss == loss for loss in watcher)
