"""Checkpoints are the model's: they load without this library, and with it again."""

import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from ask_lightning import ASKModule, ReliabilityOTLoss
from tests.helpers.clients import (
    FrozenClient,
    InlineClient,
    PlainTowers,
    Towers,
    Watcher,
    assert_same_weights,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    static_knowledge,
    wrap,
)

ALONE = """
    import sys

    class Wall:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "ask_lightning":
                raise ImportError(name)

    sys.meta_path.insert(0, Wall())
    import lightning.pytorch as pl
    import torch
    from torch import nn


    class Client(pl.LightningModule):
        def __init__(self, learning_rate=1e-2, width=8):
            super().__init__()
            self.save_hyperparameters()
            self.audio_encoder = nn.Linear(12, width)
            self.text_encoder = nn.Linear(10, width)

        def encode_audio(self, batch):
            return self.audio_encoder(batch["audio"])

        def encode_text(self, batch):
            return self.text_encoder(batch["text"])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
"""
LOAD = """
    import json

    path = sys.argv[1]
    raw = torch.load(path, weights_only=True)
    model = Client.load_from_checkpoint(path, weights_only=True)
    try:
        import ask_lightning
        raise SystemExit("the wall has a hole")
    except ImportError:
        pass
    output = model.encode_audio({"audio": torch.ones(1, 12)})
    print(json.dumps({"hparams": dict(model.hparams), "output": output.tolist(), "keys": sorted(raw)}))
"""


def define_client() -> type[pl.LightningModule]:
    """The very client of the other process."""
    source = textwrap.dedent(ALONE)
    namespace: dict = {"__name__": "alone"}
    exec(source[source.index("import lightning") :], namespace)
    return namespace["Client"]


def test_loads_without_this_library(tmp_path):
    import json

    pl.seed_everything(0, verbose=False)
    model = define_client()(learning_rate=0.02, width=6)
    keep = ModelCheckpoint(tmp_path, filename="best")
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(1), keep], enable_checkpointing=True)
    run.fit(wrap(model), make_loader())
    assert list(tmp_path.glob("knowledge-*.safetensors"))
    script = tmp_path / "alone.py"
    script.write_text(textwrap.dedent(ALONE) + textwrap.dedent(LOAD))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "best.ckpt"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["hparams"] == {"learning_rate": 0.02, "width": 6}
    assert answer["output"] == model.encode_audio({"audio": torch.ones(1, 12)}).tolist()
    plain = {
        "callbacks",
        "epoch",
        "global_step",
        "hparams_name",
        "hyper_parameters",
        "loops",
        "lr_schedulers",
    }
    plain |= {"optimizer_states", "pytorch-lightning_version", "state_dict"}
    assert set(answer["keys"]) == plain | {"ask_lightning"}


@pytest.fixture(name="fitted", scope="module")
def fitted_fixture(tmp_path_factory) -> tuple[Path, ASKModule]:
    pl.seed_everything(0, verbose=False)
    folder = tmp_path_factory.mktemp("fitted")
    module = wrap(PlainTowers(learning_rate=0.03), {"ot_factor": 0.4, "granularities": ("coarse",)})
    keep = ModelCheckpoint(folder, filename="last")
    run = make_trainer(max_epochs=2, callbacks=[make_refresh(2), keep], enable_checkpointing=True)
    run.fit(module, make_loader())
    return folder / "last.ckpt", module


def test_contents(fitted):
    path, module = fitted
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"] == {"learning_rate": 0.03}
    assert list(stored["state_dict"]) == list(PlainTowers().state_dict())
    assert stored["ask_lightning"] == {
        "loss": module.loss.options,
        "loss_class": "ask_lightning.losses.reliability_ot.ReliabilityOTLoss",
        "options": {
            "audio": "encode_audio",
            "text": "encode_text",
            "ids": None,
            "caption_ids": None,
            "step": "capture",
            "criterion": None,
            "chunk_size": None,
        },
    }
    state = stored["callbacks"]["KnowledgeRefreshCallback"]
    assert set(state) == {
        "built_at",
        "snapshot",
        "other_snapshots",
        "checkpoint_directories",
        "fingerprint",
        "settings",
        "source",
        "training_data",
        "decided_at",
        "encoded_at",
        "schedule",
        "in_flight",
    }


def test_loads_in_the_models_class(fitted):
    path, module = fitted
    model = PlainTowers.load_from_checkpoint(path, weights_only=True)
    assert_same_weights(model, module.model)
    assert model.hparams.learning_rate == 0.03


def test_loads_in_the_wrapper_with_its_loss_options(fitted):
    path, module = fitted
    for place in (path, str(path)):
        again = ASKModule.load_from_checkpoint(place, model=PlainTowers())
        assert_same_weights(again, module)
        assert again.loss.options == module.loss.options
    batch = next(iter(make_loader()))
    for ours, theirs in zip(again.embed_pairs(batch)[:2], module.embed_pairs(batch)[:2], strict=True):
        assert torch.equal(ours, theirs)
    base = module.loss.knowledge
    assert torch.equal(
        again.loss(*again.embed_pairs(batch)[:2], knowledge=base),
        module.loss(*module.embed_pairs(batch)[:2], knowledge=base),
    )


def test_wrapper_options_are_passed_on(fitted):
    path, _ = fitted
    again = ASKModule.load_from_checkpoint(path, PlainTowers(), step="encode", ids="clip_id")
    assert again.ask_step == "encode"
    with pytest.warns(UserWarning, match=r"other loss options: num_neighbors 4 → 7, ot_factor 0.4 → 0.2"):
        other = ASKModule.load_from_checkpoint(path, PlainTowers(), ReliabilityOTLoss(num_neighbors=7))
    assert other.loss.num_neighbors == 7


def test_plain_checkpoint_loads_in_the_wrapper(tmp_path):
    model = PlainTowers()
    run = make_trainer(max_epochs=1)
    run.fit(model, make_loader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    again = ASKModule.load_from_checkpoint(tmp_path / "plain.ckpt", PlainTowers())
    assert_same_weights(again.model, model)
    assert again.loss.options == ReliabilityOTLoss().options


@pytest.mark.parametrize("part", ["temperature", "interaction"])
def test_loss_options_that_a_file_cannot_hold(part, tmp_path):
    model = InlineClient()
    setting = model.logit_scale if part == "temperature" else torch.matmul
    if part == "interaction":
        setting = lambda text, audio: text @ audio.T  # noqa: E731
    module = wrap(model, {part: setting})
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"The loss had a {part} that a file cannot hold. Pass `loss="):
        ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", InlineClient())
    fresh = InlineClient()
    loss = ReliabilityOTLoss(num_neighbors=4)
    if part == "temperature":
        loss = ReliabilityOTLoss(num_neighbors=4, temperature=fresh.logit_scale)
    again = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", fresh, loss)
    assert_same_weights(again.model, model)


def test_strictness_and_late_layers(tmp_path):
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.head = None

        def configure_model(self):
            if self.head is None:
                self.head = nn.Linear(8, 8)

        def encode_audio(self, batch):
            return self.head(super().encode_audio(batch))

    module = wrap(Client())
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "late.ckpt")
    again = ASKModule.load_from_checkpoint(tmp_path / "late.ckpt", Client())
    assert torch.equal(again.model.head.weight, module.model.head.weight)
    with pytest.raises(RuntimeError, match="head"):
        ASKModule.load_from_checkpoint(tmp_path / "late.ckpt", PlainTowers())
    ASKModule.load_from_checkpoint(tmp_path / "late.ckpt", PlainTowers(), strict=False)


def test_strictness_as_a_property_of_the_model(tmp_path):
    class Client(PlainTowers):
        strict_loading = property(lambda self: False, lambda self, value: None)

        def state_dict(self, *args, **kwargs):
            whole = super().state_dict(*args, **kwargs)
            return {name: value for name, value in whole.items() if not name.startswith("text")}

    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(wrap(Client()), make_loader())
    run.save_checkpoint(tmp_path / "part.ckpt")
    again = make_trainer(max_epochs=2, callbacks=[make_refresh()])
    again.fit(wrap(Client()), make_loader(), ckpt_path=tmp_path / "part.ckpt")
    assert again.current_epoch == 2


def test_plain_run_resumes_under_ask(tmp_path):
    """The optimiser's state, the schedule and the epoch go on; only the loss is another."""

    def fit(ask, max_epochs, folder, path=None):
        pl.seed_everything(0, verbose=False)
        model, watcher = FrozenClient(), Watcher()
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        callbacks = [watcher, keep, *([make_refresh(2)] if ask else [])]
        run = make_trainer(max_epochs=max_epochs, callbacks=callbacks, enable_checkpointing=True)
        run.fit(wrap(model) if ask else model, make_loader(), ckpt_path=path)
        return watcher, run

    fit(False, 3, "begun")
    plain, _ = fit(False, 5, "plain", tmp_path / "begun" / "last.ckpt")
    watcher, run = fit(True, 5, "ask", tmp_path / "begun" / "last.ckpt")
    assert run.current_epoch == 5
    assert watcher.rates == plain.rates
    assert watcher.clips == plain.clips
    assert watcher.losses != plain.losses
    assert len(set(watcher.knowledge)) == 2, "built at epoch 3 on arrival and renewed at 4"
    state = run.optimizers[0].state_dict()["state"]
    assert {float(entry["step"]) for entry in state.values()} == {30.0}


def test_ask_run_resumes_plainly(tmp_path, fitted):
    path, module = fitted
    model = PlainTowers()
    with pytest.warns(UserWarning, match="KnowledgeRefreshCallback"):
        make_trainer(max_epochs=3).fit(model, make_loader(), ckpt_path=path)
    assert not torch.equal(model.audio_encoder.weight, module.model.audio_encoder.weight)


def test_warning_where_the_loss_resumes_with_other_options(fitted):
    path, _ = fitted
    module = wrap(PlainTowers(), {"ot_factor": 0.4, "granularities": ("coarse",), "lambda_fine": 0.0})
    with pytest.warns(
        UserWarning, match=r"The checkpoint was trained with other loss options: lambda_fine 0.2 → 0.0\.$"
    ):
        make_trainer(max_epochs=3, callbacks=[make_refresh(2)]).fit(module, make_loader(), ckpt_path=path)


def test_no_such_warning_for_equal_options(fitted, recwarn):
    path, _ = fitted
    module = wrap(PlainTowers(), {"ot_factor": 0.4, "granularities": ["coarse"]})
    make_trainer(max_epochs=3, callbacks=[make_refresh(2)]).fit(module, make_loader(), ckpt_path=path)
    assert not [warning for warning in recwarn if "loss options" in str(warning.message)]


def test_same_interaction_function_in_another_process_is_no_other_option(tmp_path, recwarn):
    """Its address differs, nothing else."""

    def make():
        return lambda text, audio: text @ audio.T

    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(wrap(PlainTowers(), {"interaction": make()}), make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    module = wrap(PlainTowers(), {"interaction": make()})
    make_trainer(max_epochs=2, callbacks=[make_refresh()]).fit(
        module, make_loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert not [warning for warning in recwarn if "loss options" in str(warning.message)]


def test_checkpoint_hooks_of_the_model(tmp_path):
    class Client(PlainTowers):
        loaded = None

        def on_save_checkpoint(self, checkpoint):
            checkpoint["vocabulary"] = ["rain", "wind"]

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["vocabulary"]

    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(wrap(Client()), make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert Client.load_from_checkpoint(tmp_path / "a.ckpt").loaded == ["rain", "wind"]
    assert ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", Client()).model.loaded == ["rain", "wind"]


def test_hyperparameters_of_the_wrapper_are_the_models():
    module = wrap(PlainTowers(learning_rate=0.5))
    assert module.hparams == {"learning_rate": 0.5}
    assert module.hparams_initial == {"learning_rate": 0.5}
    module.hparams.learning_rate = 0.25
    assert module.model.hparams.learning_rate == 0.25


def test_weights_only_checkpoint_and_validation_from_it(tmp_path):
    class Client(Towers):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.contrast(self.encode_audio(batch), self.encode_text(batch)))

    module = wrap(Client())
    module.loss.knowledge = static_knowledge(module.model)
    run = make_trainer(max_epochs=1)
    run.fit(module, make_loader(), held_out())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    score = run.callback_metrics["val/loss"].item()
    fresh = wrap(Client())
    validated = make_trainer().validate(fresh, held_out(), ckpt_path=tmp_path / "w.ckpt", verbose=False)
    assert validated[0]["val/loss"] == pytest.approx(score)
    assert fresh.loss.knowledge is None


class Listener(PlainTowers):
    """Its encoders have names of its own."""

    def listen(self, batch):
        return self.audio_encoder(batch["audio"])

    def read(self, batch):
        return self.text_encoder(batch["text"])

    encode_audio = encode_text = None

    def training_step(self, batch, batch_idx):
        return self.contrast(self.listen(batch), self.read(batch))


def test_how_the_model_was_wrapped_comes_back(tmp_path):
    module = wrap(Listener(), audio="listen", text="read", ids="clip_id", caption_ids="clip_id")
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for place in (tmp_path / "a.ckpt", (tmp_path / "a.ckpt").as_uri()):
        again = ASKModule.load_from_checkpoint(place, Listener())
        assert_same_weights(again, module)
        batch = make_loader().dataset[:3]
        assert torch.equal(again.embed_pairs(batch)[2], torch.arange(3))
        assert torch.equal(again.encode_caption_ids(batch), torch.arange(3))
    assert ASKModule.load_from_checkpoint(place, Listener(), step="encode").ask_step == "encode"


def test_callables_are_asked_for_again(tmp_path):
    def listen(model, batch):
        return model.listen(batch)

    module = wrap(Listener(), audio=listen, text="read", step="encode")
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a callable as `audio`.*load_from_checkpoint\(path, model, audio="):
        ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", Listener())
    again = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", Listener(), audio=listen)
    assert_same_weights(again, module)


def test_directory_of_deepspeed(tmp_path):
    """As DeepSpeed writes it; `tests/distributed/test_deepspeed.py` has real ones."""
    run = make_trainer(max_epochs=1, callbacks=[make_refresh()])
    module = wrap(PlainTowers())
    run.fit(module, make_loader())
    run.save_checkpoint(tmp_path / "file.ckpt")
    checkpoint = torch.load(tmp_path / "file.ckpt", weights_only=True)
    states = {"module": checkpoint.pop("state_dict"), "optimizer": checkpoint.pop("optimizer_states")}
    (tmp_path / "last.ckpt" / "checkpoint").mkdir(parents=True)
    torch.save(checkpoint | states, tmp_path / "last.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt")
    loaded = ASKModule.load_from_checkpoint(tmp_path / "last.ckpt", PlainTowers())
    assert_same_weights(loaded.model, module.model)
    assert loaded.loss.options == module.loss.options
