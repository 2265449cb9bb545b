"""Losses with state in a run: copy of the model, resuming, accumulation, precision, no trace elsewhere."""

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
from ask_lightning.callbacks import RandomStateCallback
from ask_lightning.losses import (
    CrossBatchMemoryLoss,
    HardNegativeMiningLoss,
    MomentumContrastLoss,
    NearestNeighborContrastiveLoss,
)
from tests.helpers.clients import (
    AUDIO,
    CriterionClient,
    MemoryLogger,
    PlainTowers,
    RestlessTowers,
    Towers,
    Watcher,
    assert_same_weights,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    own_metrics,
)

STEPS = 6  # in an epoch of `make_loader()`
LOSSES = {
    "momentum": lambda: MomentumContrastLoss(queue_size=40, momentum=0.8),
    "memory": lambda: CrossBatchMemoryLoss(memory_size=40, start_step=3),
    "neighbors": lambda: NearestNeighborContrastiveLoss(support_size=20),
    "mining": lambda: HardNegativeMiningLoss(num_negatives=4, num_candidates=20),
}
WITH_QUEUE = [name for name in LOSSES if name != "mining"]


class NormedTowers(PlainTowers):
    """With running means and a metric of its own that no weight is trained by."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.norm = nn.BatchNorm1d(AUDIO)

    def encode_audio(self, batch):
        return self.audio_encoder(self.norm(batch["audio"]))


class Terms(pl.Callback):
    """Keeps the loss's terms of each step; first among the callbacks, as the refresh takes them away."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows.append({name: float(term) for name, term in pl_module.loss.last.items()})


def fit(
    name,
    directory=None,
    *,
    epochs=3,
    resume=None,
    model=NormedTowers,
    extra=(),
    module=None,
    step="auto",
    **settings,
):
    """The module, its losses, and the terms of each step."""
    pl.seed_everything(1, verbose=False)
    if module is None:
        module = ASKModule(model(), LOSSES[name](), ids="clip_id", step=step)
    watcher, terms = Watcher(), Terms()
    refresh = [make_refresh(2)] if module.loss.needs_knowledge else []
    keep = [ModelCheckpoint(directory, save_last=True)] if directory else []
    callbacks = [terms, *refresh, watcher, *extra, *keep]
    run = make_trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=bool(keep), **settings)
    run.fit(module, make_loader(captions_per_clip=3), held_out(), ckpt_path=resume)
    return module, watcher.losses, terms.rows


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_resumed_run_is_that_without_a_break(name, accumulate, tmp_path):
    named = {"accumulate_grad_batches": accumulate}
    whole, losses, _ = fit(name, epochs=5, **named)
    fit(name, tmp_path / "begun", epochs=2, **named)
    resumed, rest, terms = fit(name, epochs=5, resume=tmp_path / "begun" / "last.ckpt", **named)
    assert rest == losses[2 * STEPS :]
    assert_same_weights(resumed, whole)
    if name in WITH_QUEUE:
        assert terms[0]["queue_fill"] == 1
        ours, theirs = (module.loss.training_state()["queue"] for module in (resumed, whole))
        assert all(torch.equal(rows, theirs[column]) for column, rows in ours.items())


class NoisyParts(Towers):
    """With dropout and running means; its encoders take parts of the batch, which only its step can tell."""

    def __init__(self, learning_rate: float = 1e-2) -> None:
        super().__init__(learning_rate)
        self.norm = nn.Sequential(nn.BatchNorm1d(AUDIO), nn.Dropout(0.3))

    def encode_audio(self, waveform):
        if isinstance(waveform, dict):
            waveform = self.norm(waveform["audio"])
            raise TypeError("no waveform, which it has noticed late")
        return self.audio_encoder(self.norm(waveform))

    def encode_text(self, tokens):
        return self.text_encoder(tokens)

    def training_step(self, batch, batch_idx):
        return self.contrast(self.encode_audio(batch["audio"]), self.encode_text(batch["text"]))


@pytest.mark.parametrize("name", LOSSES)
def test_resumed_run_finds_out_anew_what_the_encoders_take(name, tmp_path):
    """That it runs the step once more to see it draws no random number and moves no running mean."""
    whole, losses, _ = fit(name, epochs=4, model=NoisyParts, extra=[RandomStateCallback()])
    fit(name, tmp_path, epochs=2, model=NoisyParts, extra=[RandomStateCallback()])
    last = tmp_path / "last.ckpt"
    resumed, rest, _ = fit(name, epochs=4, resume=last, model=NoisyParts, extra=[RandomStateCallback()])
    assert rest == losses[2 * STEPS :]
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("name", WITH_QUEUE)
def test_checkpoint_holds_the_state_beside_the_models_weights(name, tmp_path):
    module, *_ = fit(name, tmp_path, epochs=2)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(stored["state_dict"]) == list(NormedTowers().state_dict())
    state = stored["ask_lightning"]["state"]
    assert state["queue"]["ids"].tolist() == module.loss.training_state()["queue"]["ids"].tolist()
    assert len(stored["optimizer_states"][0]["param_groups"][0]["params"]) == 6
    assert_same_weights(NormedTowers.load_from_checkpoint(tmp_path / "last.ckpt"), module.model)

    again = ASKModule.load_from_checkpoint(tmp_path / "last.ckpt", NormedTowers(), ids="clip_id")
    assert type(again.loss) is type(module.loss)
    assert again.loss.options == module.loss.options
    _, _, terms = fit(name, module=again, epochs=1)
    assert terms[0]["queue_fill"] == 0, "a new run from these weights has a new queue"


def test_weights_only_checkpoint_holds_no_state(tmp_path):
    module, *_ = fit("memory", epochs=1)
    module.trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    assert "state" not in torch.load(tmp_path / "w.ckpt", weights_only=True)["ask_lightning"]
    fresh = ASKModule(NormedTowers(), LOSSES["memory"](), ids="clip_id")
    fresh.load_state_dict(torch.load(tmp_path / "w.ckpt", weights_only=True)["state_dict"])


def test_evaluation_of_a_checkpoint(tmp_path):
    class Client(NormedTowers):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    fit("momentum", tmp_path, model=Client)
    for loss in (LOSSES["momentum"](), LOSSES["memory"](), None):
        fresh = ASKModule(Client(), loss, ids="clip_id")
        (scores,) = make_trainer().validate(
            fresh, held_out(), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )
        assert scores["val/loss"] > 0


def test_checkpoint_without_the_state_of_the_loss(tmp_path):
    """Of a run with another loss, or of a plain one."""
    fit("memory", tmp_path / "memory", epochs=1)
    with pytest.warns(UserWarning, match="The checkpoint holds no state of a MomentumContrastLoss, so"):
        _, losses, terms = fit("momentum", epochs=2, resume=tmp_path / "memory" / "last.ckpt")
    assert len(losses) == STEPS
    assert terms[0]["queue_fill"] == 0


def test_smaller_queue_at_resume(tmp_path):
    module, *_ = fit("momentum", tmp_path, epochs=1)
    newest = module.loss.training_state()["queue"]["ids"][-10:]
    smaller = ASKModule(NormedTowers(), MomentumContrastLoss(queue_size=10, momentum=0.8), ids="clip_id")
    with pytest.warns(UserWarning, match=r"other loss options: queue_size 40 → 10\.$"):
        smaller.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert smaller.loss.training_state()["queue"]["ids"].equal(newest)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_copy_follows_after_real_optimiser_steps_only(accumulate):
    class Follow(pl.Callback):
        """The moving average by hand, from the model's weights after each optimiser step."""

        def __init__(self) -> None:
            self.step, self.average, self.moves = 0, None, 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            weight = pl_module.model.audio_encoder.weight.detach()
            if self.average is None:
                self.average = weight.clone()
            if trainer.global_step != self.step:
                self.step = trainer.global_step
                self.average = 0.8 * self.average + 0.2 * weight
                self.moves += 1

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            stored = pl_module.loss.training_state()["encoder"]["weights"]
            torch.testing.assert_close(stored["audio_encoder.weight"], self.average)

    follow = Follow()
    module, *_ = fit("momentum", epochs=2, extra=[follow], accumulate_grad_batches=accumulate)
    steps = 2 * -(-STEPS // accumulate)
    assert module.trainer.global_step == steps
    assert follow.moves == steps - 1


def test_capture_and_encode_have_the_same_keys():
    runs = []
    for step in ("capture", "encode"):
        runs.append(fit("momentum", step=step)[1])
    assert runs[0] == runs[1]


def test_criterion():
    module = ASKModule(CriterionClient(), LOSSES["momentum"](), ids="clip_id", criterion="loss_fn")
    _, losses, terms = fit("momentum", module=module)
    assert terms[-1]["queue_fill"] == 1
    assert all(loss > term["loss"] for loss, term in zip(losses, terms, strict=True)), "with the auxiliary"


@pytest.mark.parametrize("name", WITH_QUEUE)
def test_the_run_around_it_is_that_of_any_loss(name):
    """Random numbers, logged names and parameters; the copy draws noise of its own and logs nothing."""

    class Client(RestlessTowers):
        def encode_audio(self, batch):
            audio = super().encode_audio(batch)
            self.log("train/norm", audio.norm())
            assert self.trainer.training or self.trainer.sanity_checking or self.trainer.validating
            return audio

    def run(loss):
        logger = MemoryLogger()
        module = ASKModule(Client(), loss, ids="clip_id")
        fit(name, module=module, logger=logger, log_every_n_steps=1)
        assert {id(weight) for weight in module.parameters()} == {
            id(weight) for weight in module.model.parameters()
        }
        return logger

    ours, plain = run(LOSSES[name]()), run(CrossBatchMemoryLoss(start_step=10**6))
    assert ours.values("train/noise") == plain.values("train/noise")
    assert len(ours.values("train/norm")) == len(plain.values("train/norm"))
    assert own_metrics(dict.fromkeys(ours.names, 0)) == own_metrics(dict.fromkeys(plain.names, 0))
    assert len(ours.values("ask/queue_fill")) == 3 * STEPS


def test_validation_leaves_the_queue_alone():
    class Client(NormedTowers):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    for name in WITH_QUEUE:
        _, losses, _ = fit(name, model=Client, val_check_interval=2)
        assert losses == fit(name)[1]


def test_frozen_parts_stay_so_in_the_copy():
    class Client(NormedTowers):
        def on_train_epoch_start(self):
            self.norm.eval()

    class Modes(pl.Callback):
        seen: list = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.seen.append(pl_module.loss._encoder._average.module.norm.training)

    fit("momentum", model=Client, epochs=1, extra=[Modes()])
    assert Modes.seen == [False] * STEPS


def test_module_that_was_left_in_evaluation_mode():
    module = ASKModule(PlainTowers(), LOSSES["memory"](), ids="clip_id").eval()
    _, _, terms = fit("memory", module=module)
    assert terms[-1]["queue_fill"] == 1


@pytest.mark.parametrize("name", WITH_QUEUE)
def test_second_fit_starts_anew(name):
    module, *_ = fit(name)
    assert module.loss.training_state()["queue"]
    module.load_state_dict(NormedTowers().state_dict())
    _, _, terms = fit(name, module=module)
    assert terms[0]["queue_fill"] == 0


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", WITH_QUEUE)
def test_copies(name, duplicate):
    module, *_ = fit(name, epochs=1)
    before = copy.deepcopy(module.loss.training_state())
    twin = duplicate(module)
    assert_same_weights(twin, module)
    fit(name, module=twin)
    after = module.loss.training_state()
    for column, rows in before["queue"].items():
        assert torch.equal(after["queue"][column], rows)
    if name == "momentum":
        for weight, value in before["encoder"]["weights"].items():
            assert torch.equal(after["encoder"]["weights"][weight], value)


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_precision(name):
    module, losses, _ = fit(name, precision="bf16-mixed")
    assert all(torch.isfinite(torch.tensor(losses)))
    state = module.loss.training_state()
    for column, rows in state.get("queue", {}).items():
        assert rows.dtype == (torch.int64 if column == "ids" else torch.float32)
    if name == "momentum":
        assert state["encoder"]["weights"]["audio_encoder.weight"].dtype == torch.float32
    exact = fit(name)[1]
    torch.testing.assert_close(torch.tensor(losses[:3]), torch.tensor(exact[:3]), rtol=0.05, atol=0.02)


def test_moving_average_in_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"in torch\.bfloat16 would stand still"):
        fit("momentum", precision="bf16-true")


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="this Lightning has none")
def test_weight_averaging_beside_it():
    module, *_ = fit("momentum", extra=[pl.callbacks.EMAWeightAveraging(decay=0.5)])
    assert len(module.loss.training_state()["queue"]["ids"]) == 40


def test_model_without_a_step():
    module = ASKModule(Towers(), LOSSES["momentum"](), ids="clip_id")
    assert module.ask_step == "encode"
    assert fit("momentum", module=module)[2][-1]["queue_fill"] == 1


@pytest.mark.parametrize("name", WITH_QUEUE)
def test_learning_rate_finder_leaves_no_state(name, tmp_path, recwarn):
    class Client(NormedTowers):
        lr = 1e-5

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = ASKModule(Client(), LOSSES[name](), ids="clip_id")
    run = make_trainer(max_epochs=2, default_root_dir=tmp_path)
    Tuner(run).lr_find(module, make_loader(), num_training=20, max_lr=10.0)
    _, _, terms = fit(name, module=module)
    assert terms[0]["queue_fill"] == 0
    assert not [warning for warning in recwarn if "no state" in str(warning.message)]


@pytest.mark.parametrize("refreshed", [False, True])
def test_terms_are_logged_once_with_and_without_a_refresh(refreshed):
    logger = MemoryLogger()
    extra = [make_refresh(2)] if refreshed else []
    fit("memory", extra=extra, logger=logger, log_every_n_steps=1)
    assert len(logger.values("ask/queue_fill")) == 3 * STEPS
    assert logger.values("ask/queue_fill")[-1] == 1


class TwiceSGD(torch.optim.SGD):
    """Evaluates each batch a second time with other weights, as sharpness-aware minimisation does."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        before = [weight.clone() for weight in weights]
        for weight in weights:
            weight.add_(weight.grad, alpha=0.01)
        with torch.enable_grad():
            closure()
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
        super().step()
        return loss


class TwiceTowers(PlainTowers):
    def configure_optimizers(self):
        return TwiceSGD(self.parameters(), lr=1e-2)


class NewtonTowers(PlainTowers):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1e-2, max_iter=3)


@pytest.mark.parametrize("model", [TwiceTowers, NewtonTowers])
@pytest.mark.parametrize("name", WITH_QUEUE)
def test_a_batch_that_an_optimiser_evaluates_again_is_remembered_once(name, model):
    module, *_ = fit(name, model=model, epochs=2)
    plain, *_ = fit(name, model=PlainTowers, epochs=2)
    ours, theirs = (each.loss.training_state() for each in (module, plain))
    assert torch.equal(ours["queue"]["ids"], theirs["queue"]["ids"])
    assert ours.get("num_batches") == theirs.get("num_batches")


class BrokenBatch(PlainTowers):
    """One batch has NaN, whose step is left out, as loss scaling does and many scripts do."""

    def encode_audio(self, batch):
        return self.spoil(super().encode_audio(batch))

    def encode_text(self, batch):
        return self.spoil(super().encode_text(batch))

    def spoil(self, embeddings):
        return embeddings * torch.nan if self.trainer.global_step == 4 else embeddings

    def on_before_optimizer_step(self, optimizer):
        if not all(weight.grad.isfinite().all() for weight in self.parameters()):
            optimizer.zero_grad()


@pytest.mark.parametrize("name", WITH_QUEUE)
def test_one_broken_batch_does_not_spoil_those_after_it(name):
    _, losses, _ = fit(name, model=BrokenBatch)
    assert [step for step, loss in enumerate(losses) if loss != loss] == [4]
