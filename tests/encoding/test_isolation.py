"""A refresh leaves nothing behind but a new base: streams, modes, buffers, logs, stages."""

import copy
import random
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ask_lightning.encoding.isolation import isolated_copy
from tests.helpers.clients import (
    AUDIO,
    FrozenClient,
    Pairs,
    PlainTowers,
    RestlessTowers,
    Watcher,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    wrap,
)
from tests.helpers.spied_refresh import Spied


class Restless(Pairs):
    def __getitem__(self, row):
        return super().__getitem__(row) | {"noise": random.random() + np.random.random() + torch.rand(())}  # noqa: NPY002


class DrawingEncoders(RestlessTowers):
    """Draws from all streams wherever it is called."""

    def encode_text(self, batch):
        torch.rand(1), random.random(), np.random.random()  # noqa: NPY002
        return super().encode_text(batch)


def drawing_source():
    torch.rand(3), random.random(), np.random.random()  # noqa: NPY002
    return Restless(48)


@pytest.mark.parametrize("client", [DrawingEncoders, FrozenClient])
@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (None, {}),
        (drawing_source, {}),
        (None, {"num_workers": 1}),
        (Restless(48), {"index": "IVF2,Flat"}),
    ],
    ids=["training data", "callable", "workers", "faiss"],
)
def test_world_is_as_it_was(client, source, settings):
    pl.seed_everything(0, verbose=False)
    spied = Spied(2, source, **settings)
    data = DataLoader(Restless(48), 8, shuffle=True)
    run = make_trainer(max_epochs=4, callbacks=[spied])
    run.fit(wrap(client()), data, held_out())
    assert spied.refreshed_at == [(0, 0), (2, 12)]


def test_evaluation_mode_without_gradient_in_a_validation_stage():
    seen = []

    class Client(RestlessTowers):
        def encode_audio(self, batch):
            if not torch.is_grad_enabled():
                seen.append((self.training, self.dropout.training, self.norm.training, self.trainer.training))
            return super().encode_audio(batch)

    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(Client()), make_loader())
    assert set(seen) == {(False, False, False, False)}
    assert len(seen) == 6


def test_batch_norm_statistics_and_counters_do_not_see_the_source():
    model = RestlessTowers()
    make_trainer(max_epochs=2, callbacks=[make_refresh(1)]).fit(wrap(model), make_loader())
    assert model.norm.num_batches_tracked == 12


def test_logs_of_encoders_do_not_leak():
    class Client(PlainTowers):
        def encode_audio(self, batch):
            embeddings = super().encode_audio(batch)
            self.log("norm/audio", embeddings.norm(), on_step=False, on_epoch=True, reduce_fx="sum")
            self.log_dict({"count": float(len(embeddings))}, on_step=False, on_epoch=True, reduce_fx="sum")
            return embeddings

    watcher = Watcher()
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(1), watcher])
    run.fit(wrap(Client()), make_loader())
    assert [row["count"] for row in watcher.metrics] == [48.0, 48.0]


@pytest.fixture
def _signals():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(Pairs):
    """Raises in the middle of a reading, once that is armed."""

    error: BaseException | None = None

    def __getitem__(self, row):
        if row == 30 and self.error is not None:
            raise self.error
        random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
        return super().__getitem__(row)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("in the dataset")], ids=repr)
def test_interrupted_refresh_leaves_everything_as_it_was(error):
    source = Interrupting(48)

    class Arm(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            source.error = error

    class Client(RestlessTowers):
        def on_train_start(self):
            self.norm.eval()

    pl.seed_everything(0, verbose=False)
    spied, watcher = Spied(1, source), Watcher()
    module = wrap(Client())
    run = make_trainer(callbacks=[spied, watcher, Arm()])
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ZeroDivisionError):
        run.fit(module, DataLoader(Pairs(48), 8, shuffle=True))
    assert spied.refreshed_at == [(0, 0)], "Spied has compared streams, modes, stage and logs"
    assert module.loss.knowledge.fingerprint == watcher.knowledge[-1]
    assert not module.model.norm.training
    assert module.model.dropout.training


def test_buffers_that_encoders_change_are_restored():
    class Client(PlainTowers):
        """Keeps a queue of what it has encoded, and replaces another buffer."""

        def __init__(self):
            super().__init__()
            self.register_buffer("queue", torch.zeros(4))
            self.register_buffer("last", torch.zeros(1))

        def encode_audio(self, batch):
            if not self.training:
                self.queue += 1
                self.last = self.last + 1
            return super().encode_audio(batch)

    model = Client()
    queue, last = model.queue, model.last
    make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(wrap(model), make_loader())
    assert model.queue is queue
    assert model.last is last
    assert not queue.any()
    assert not last.any()


class Merging(torch.nn.Linear):
    """Adds a low-rank update to its weight while it is in evaluation mode."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        generator = torch.Generator().manual_seed(0)
        self.down = torch.nn.Parameter(torch.randn(2, sizes[0], generator=generator))
        self.up = torch.nn.Parameter(torch.randn(sizes[1], 2, generator=generator))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.detach() @ self.down.detach()
            self.merged = not mode
        return self

    def forward(self, audio):
        output = super().forward(audio)
        return output if self.merged else output + audio @ self.down.T @ self.up.T


@pytest.mark.parametrize("frozen", [False, True])
def test_modules_that_merge_are_unmerged_exactly(frozen):
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.audio_encoder = Merging(AUDIO, 8)
            if frozen:
                self.audio_encoder.eval()

    model = Client()
    before = model.audio_encoder.weight.detach().clone()
    merged = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            part = model.audio_encoder
            merged.append((part.merged, part.training, torch.equal(part.weight, before)))

    run = make_trainer(max_epochs=1, max_steps=1, callbacks=[make_refresh(), Look()])
    run.fit(wrap(model), make_loader())
    assert merged == [(frozen, not frozen, True)]


class Drawing(Pairs):
    """Augments by generators of its own."""

    def __init__(self, size=48):
        super().__init__(size)
        self.torch_generator = torch.Generator().manual_seed(0)
        self.generators = {"numpy": [np.random.default_rng(0)], "python": random.Random(0)}

    def __getitem__(self, row):
        noise = torch.rand((), generator=self.torch_generator).item()
        noise += self.generators["numpy"][0].random() + self.generators["python"].random()
        return super().__getitem__(row) | {"noise": torch.tensor(noise)}


def test_generators_of_a_dataset_do_not_advance():
    def noises(callbacks, ask):
        seen = []

        class Look(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen.extend(batch["noise"].tolist())

        data = DataLoader(torch.utils.data.Subset(Drawing(), range(40)), 8)
        model = PlainTowers()
        make_trainer(max_epochs=2, callbacks=[*callbacks, Look()]).fit(wrap(model) if ask else model, data)
        return seen

    assert noises([make_refresh(1)], True) == noises([], False)


def test_a_copy_encodes_without_a_trace():
    """It sees the trainer while it encodes; what it draws and logs is not the run's, also after an error."""

    class Client(DrawingEncoders):
        def encode_text(self, batch):
            self.log("train/text", 1.0)
            self.log_dict({"train/both": 1.0})
            assert self.trainer is trainer
            return super().encode_text(batch)

    trainer, model = make_trainer(), Client()
    twin = copy.deepcopy(model)
    batch = next(iter(make_loader()))
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    with isolated_copy(twin, trainer):
        first = twin.encode_text(batch)
    with pytest.raises(KeyError), isolated_copy(twin, trainer):
        twin.encode_text({})
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(first, model.text_encoder(batch["text"]))
    assert twin._trainer is None
    assert "log" not in vars(twin)
