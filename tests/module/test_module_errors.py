"""What `ASKModule` cannot do, it says before training, with the way out."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import pytorch_lightning as other_pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint

import ask_lightning.module
from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.encoding.compatibility import check_sharding
from ask_lightning.encoding.loss_binding import check_borrowed_parameters
from ask_lightning.losses import MomentumContrastLoss, NTXentLoss
from tests.helpers.clients import (
    CriterionClient,
    InlineClient,
    PlainTowers,
    SelfContained,
    Towers,
    held_out,
    make_loader,
    make_refresh,
    make_trainer,
    static_knowledge,
    wrap,
)


class ManualTowers(PlainTowers):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwinPackageTowers(other_pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.audio_encoder, self.text_encoder = nn.Linear(12, 8), nn.Linear(10, 8)

    def encode_audio(self, batch):
        return self.audio_encoder(batch["audio"])

    def encode_text(self, batch):
        return self.text_encoder(batch["text"])

    def training_step(self, batch, batch_idx):
        return self.encode_audio(batch).mean() + self.encode_text(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_fit_without_the_callback():
    with pytest.raises(
        RuntimeError, match=r"no knowledge to learn from.*callbacks=\[KnowledgeRefreshCallback\(T=15\)\]"
    ):
        make_trainer().fit(wrap(PlainTowers()), make_loader())


def test_fit_without_the_callback_but_with_a_base(monkeypatch):
    """It is said that nothing renews the base, which may be left over from an earlier run."""
    said = []
    monkeypatch.setattr(ask_lightning.module, "rank_zero_info", said.append)
    module = wrap(PlainTowers())
    base = module.loss.knowledge = static_knowledge(module.model)
    make_trainer(max_epochs=1).fit(module, make_loader())
    assert module.loss.knowledge is base
    assert said[0] == (
        f"ASKModule trains with the knowledge in `loss.knowledge`, {base}, which stays as it is: the trainer "
        "has no KnowledgeRefreshCallback."
    )


def test_a_base_of_ones_own_beside_the_callback_is_replaced_and_that_is_said(monkeypatch):
    said = []
    monkeypatch.setattr("ask_lightning.callbacks.refresh.rank_zero_info", said.append)
    module, refresh = wrap(PlainTowers()), make_refresh()
    own = module.loss.knowledge = static_knowledge(module.model)
    for _ in range(2):  # what the callback has made itself is no news
        make_trainer(max_epochs=1, callbacks=[refresh]).fit(module, make_loader())
    assert module.loss.knowledge is not own
    (told,) = [each for each in said if "in place of that in `loss.knowledge`" in each]
    assert "leave the callback out" in told


def test_a_step_whose_loss_is_replaced_as_a_whole_is_told_so(monkeypatch):
    said = []
    monkeypatch.setattr(ask_lightning.module, "rank_zero_info", said.append)
    for options in ({}, {"criterion": "loss_fn"}, {"step": "encode"}):
        module = wrap(CriterionClient(), **options)
        make_trainer(max_epochs=1, callbacks=[make_refresh()]).fit(module, make_loader())
    (told,) = [each for each in said if "takes the place of" in each]
    assert "all that `CriterionClient.training_step` returns" in told
    assert 'ASKModule(..., criterion="...")' in told


def test_callback_on_a_module_without_ask():
    with pytest.raises(
        RuntimeError, match=r"one loss of ask_lightning.losses, but PlainTowers has 0.*trainer.fit\(ASKModule"
    ):
        make_trainer(callbacks=[make_refresh()]).fit(PlainTowers(), make_loader())


def test_callback_on_a_module_with_two_losses():
    with pytest.raises(RuntimeError, match=r"SelfContained has a loss of its own .* without ASKModule"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(SelfContained()), make_loader())


def test_module_with_a_loss_but_without_the_methods():
    class Client(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.objective = ReliabilityOTLoss()
            self.layer = nn.Linear(2, 2)

        def encode_text(self, batch): ...

        def training_step(self, batch): ...

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="found no methods of Client that encode audio and text"):
        make_trainer(callbacks=[make_refresh()]).fit(Client(), make_loader())


def test_module_whose_loss_compares_clips_needs_their_ids():
    with pytest.raises(RuntimeError, match=r"needs a method `encode_ids` that takes a batch"):
        make_trainer(callbacks=[make_refresh()]).fit(SelfContained(exclude_self=True), make_loader())


@pytest.mark.parametrize("argument", ["audio", "text"])
def test_missing_method(argument):
    with pytest.raises(
        ValueError,
        match=rf"Argument `{argument}` of ASKModule has to name a method of Towers.*no method 'embed'",
    ):
        ASKModule(Towers(), **{argument: "embed"})


def test_ids_missing():
    for setting in ({"exclude_self": True}, {"positives": "ids"}):
        with pytest.raises(ValueError, match=r"Argument `ids` has to be given"):
            ASKModule(PlainTowers(), ReliabilityOTLoss(**setting))


def test_ids_of_another_name():
    module = wrap(PlainTowers(), {"exclude_self": True}, ids="file")
    with pytest.raises(
        ValueError, match=r"key of the batch .* got 'file' and the batch is \['audio', 'clip_id', 'text'\]"
    ):
        make_trainer(callbacks=[make_refresh()]).fit(module, make_loader())


def test_caption_ids_of_another_name():
    module = wrap(PlainTowers(), ids="clip_id", caption_ids="words")
    with pytest.raises(
        ValueError, match=r"Argument `caption_ids` has to be a key .* got 'words' and the batch"
    ):
        make_trainer(callbacks=[make_refresh()]).fit(module, make_loader())


@pytest.mark.parametrize(
    ("found", "count"), [(lambda model, batch: None, 0), (lambda model, batch: [1, 2], 2)]
)
def test_caption_ids_of_another_number(found, count):
    module = wrap(PlainTowers(), ids="clip_id", caption_ids=found)
    with pytest.raises(ValueError, match=f"have to be 8 caption ids in this batch, but got {count}"):
        make_trainer(callbacks=[make_refresh()]).fit(module, make_loader())


def test_caption_ids_without_clips():
    with pytest.raises(ValueError, match=r"Argument `ids` has to be given with `caption_ids`"):
        ASKModule(PlainTowers(), caption_ids="caption")


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), 3])
def test_loss_of_another_class(loss):
    with pytest.raises(
        TypeError, match=rf"`loss` has to be a loss of ask_lightning.losses, but got {type(loss).__name__}"
    ):
        ASKModule(PlainTowers(), loss)


def test_loss_with_parameters_of_its_own():
    class Interaction(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))

    loss = ReliabilityOTLoss(interaction=Interaction())
    with pytest.raises(ValueError, match=r"parameters that are not the model's \(interaction.weight\)"):
        ASKModule(PlainTowers(), loss)
    loss = ReliabilityOTLoss(temperature=nn.Parameter(torch.tensor(0.1)))
    with pytest.raises(ValueError, match=r"not the model's \(temperature\).*attributes of the model"):
        ASKModule(PlainTowers(), loss)


def test_manual_optimisation():
    with pytest.raises(RuntimeError, match=r"manual optimization.*`automatic_optimization = True`"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(ManualTowers()), make_loader())
    module = wrap(ManualTowers())
    module.loss.knowledge = static_knowledge(module.model)
    with pytest.raises(RuntimeError, match=r"manual optimization"):
        make_trainer().fit(module, make_loader())


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_epoch_start"])
def test_manual_optimisation_that_a_hook_switches_on(hook):
    """Lightning would ignore the ASK loss, and the step would go on with the model's own."""
    model = ManualTowers()
    model.automatic_optimization = True
    setattr(model, hook, lambda *_: setattr(model, "automatic_optimization", False))
    with pytest.raises(RuntimeError, match=r"manual optimization"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(model), make_loader())


def unsupported_strategies():
    # Their constructors need packages.
    deepspeed = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    deepspeed.config = {"zero_optimization": {"stage": 3}}
    yield deepspeed, r"with stage 3 of ZeRO.*DeepSpeedStrategy\(stage=2\).*divide the model by FSDP2"
    yield XLAStrategy.__new__(XLAStrategy), r"`accelerator=\"gpu\"`"
    yield SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy), r"`accelerator=\"gpu\"`"


@pytest.mark.parametrize(
    ("strategy", "remedy"),
    list(unsupported_strategies()),
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("ask", [True, False])
def test_unsupported_strategies(strategy, remedy, ask, monkeypatch):
    module = wrap(PlainTowers()) if ask else SelfContained()
    run = make_trainer(callbacks=[make_refresh()])
    monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    text = f"does not support {type(strategy).__name__}.*{remedy}"
    with pytest.raises(RuntimeError, match=text):
        run.callbacks[0].setup(run, module, "fit")
    if ask:
        monkeypatch.setattr(pl.LightningModule, "trainer", run)
        with pytest.raises(RuntimeError, match=text):
            module.setup("fit")


def test_tensor_parallelism(monkeypatch):
    run, strategy = make_trainer(callbacks=[make_refresh()]), ModelParallelStrategy(2, 4)
    sizes = {"data_parallel": 2, "tensor_parallel": 4}
    strategy._device_mesh = {
        name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()
    }
    monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    text = r"tensor_parallel_size of 4.*their own negatives.*data_parallel_size=8, tensor_parallel_size=1"
    with pytest.raises(RuntimeError, match=text):
        run.callbacks[0].setup(run, wrap(PlainTowers()), "fit")


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy(1, 1)], ids=["fsdp", "fsdp2"])
def test_what_needs_whole_parameters(strategy, monkeypatch):
    run, name = make_trainer(), type(strategy).__name__
    monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    check_sharding(run, ReliabilityOTLoss(), None)
    with pytest.raises(RuntimeError, match=rf"`chunk_size`.*{name}, which frees.*activation checkpointing"):
        check_sharding(run, ReliabilityOTLoss(), 4)
    with pytest.raises(RuntimeError, match=rf"MomentumContrastLoss.*{name}.*CrossBatchMemoryLoss"):
        check_sharding(run, MomentumContrastLoss(), None)


def test_a_parameter_that_is_another_one_by_now(monkeypatch):
    model = PlainTowers()
    model.tau = nn.Parameter(torch.tensor(0.1))
    loss = ReliabilityOTLoss(temperature=model.tau)
    module, run = ASKModule(model, loss), make_trainer()
    check_borrowed_parameters(run, module, loss)
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "strategy", FSDPStrategy())
        with pytest.raises(RuntimeError, match=r"`temperature` of ReliabilityOTLoss.*FSDPStrategy divides"):
            check_borrowed_parameters(run, module, loss)
    model.tau = nn.Parameter(torch.tensor(0.1))  # as `fully_shard` does
    with pytest.raises(RuntimeError, match=r'no longer has.*temperature="\.\.\."'):
        check_borrowed_parameters(run, module, loss)


@pytest.mark.parametrize("ask", [True, False])
def test_several_processes_by_another_strategy_than_ddp(ask, monkeypatch):
    module = wrap(PlainTowers()) if ask else SelfContained()
    run = make_trainer(callbacks=[make_refresh()])
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(
        RuntimeError, match=r'not tested with SingleDeviceStrategy.*`strategy="ddp"` on several'
    ):
        run.callbacks[0].setup(run, module, "fit")


def test_model_of_the_twin_package():
    with pytest.raises(
        TypeError, match=r"module of the `pytorch_lightning` package.*`import lightning.pytorch as pl`"
    ):
        ASKModule(TwinPackageTowers())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, PlainTowers])
def test_model_that_is_no_lightning_module(model):
    with pytest.raises(TypeError, match=r"has to be a `lightning.pytorch.LightningModule`, but got"):
        ASKModule(model)


def twin_trainer(**settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return other_pl.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **(quiet | settings))


def test_trainer_of_the_twin_package_given_an_ask_module():
    with pytest.raises(TypeError, match="LightningModule"):
        twin_trainer().fit(wrap(PlainTowers()), make_loader())


def test_trainer_of_the_twin_package_given_the_callback():
    class Client(TwinPackageTowers):
        def __init__(self):
            super().__init__()
            self.objective = ReliabilityOTLoss(num_neighbors=4)

    for model in (Client(), TwinPackageTowers()):
        # Older versions of the twin refuse the callback themselves, less clearly.
        with pytest.raises(
            (TypeError, ValueError),
            match=r"is a `pytorch_lightning.*Use `lightning.pytorch.Trainer`|^Expected a parent$",
        ):
            twin_trainer(callbacks=[make_refresh()]).fit(model, make_loader())


def test_trainer_of_the_twin_package_among_validation_and_prediction():
    """Only training needs ASK; the twin package's trainer refuses by itself, never in silence."""
    with pytest.raises(TypeError, match="LightningModule"):
        twin_trainer().validate(wrap(PlainTowers()), held_out())


@pytest.mark.parametrize("ask", [True, False])
def test_more_neighbours_than_pairs(ask):
    module = wrap(PlainTowers(), {"num_neighbors": 49}) if ask else SelfContained(num_neighbors=49)
    with pytest.raises(
        ValueError,
        match=r"`k` has to be in \[1, 48\] for a knowledge base of 48 pairs.*got 49.*`num_neighbors`",
    ):
        make_trainer(callbacks=[make_refresh()]).fit(module, make_loader())


def test_the_same_encoder_for_both_sides():
    with pytest.raises(ValueError, match=r"have to be two encoders, but got 'encode_text' for both"):
        ASKModule(PlainTowers(), audio="encode_text", text="encode_text")


@pytest.mark.parametrize(
    ("names", "side", "name"),
    [
        ({"audio": "encode_text"}, "audio", "encode_text"),
        ({"text": "encode_audio"}, "text", "encode_audio"),
        ({"audio": "encode_text", "text": "encode_audio"}, "audio", "encode_text"),
    ],
)
def test_the_encoder_of_the_other_side(names, side, name):
    message = rf"`{side}` of ASKModule has to name the method that encodes {side}, but got '{name}'"
    with pytest.raises(ValueError, match=message):
        ASKModule(PlainTowers(), **names)


def test_widths_differ():
    class Client(Towers):
        def __init__(self):
            super().__init__()
            self.text_encoder = nn.Linear(10, 6)

    with pytest.raises(ValueError, match=r"audio \(8, 8\) and text \(8, 6\)"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client()), make_loader())


def test_embeddings_with_a_token_axis():
    class Client(Towers):
        def encode_audio(self, batch):
            return super().encode_audio(batch)[:, None].expand(-1, 3, -1)

        def encode_text(self, batch):
            return super().encode_text(batch)[:, None].expand(-1, 3, -1)

    with pytest.raises(ValueError, match=r"audio \(8, 3, 8\)"):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client()), make_loader())


@pytest.mark.parametrize("T", [0, -1, 1.5, "3", None, True])
def test_period_out_of_range(T):
    with pytest.raises(
        ValueError, match=rf"Argument `T` has to be an integer of at least 1 or \"auto\", but got {T!r}"
    ):
        KnowledgeRefreshCallback(T)


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("num_prototypes", 0, "an integer of at least 1"),
        ("batch_size", 0, "an integer of at least 1"),
        ("num_workers", -1, "an integer of at least 0"),
        ("prototype_pairing", "random", "one of .*matched"),
        ("placement", "split", r"one of \('replicated', 'sharded'\)"),
        ("storage", "int8", r"one of \('float32', 'float16', 'bfloat16', 'memmap'\)"),
    ],
)
def test_other_arguments_out_of_range(argument, value, text):
    with pytest.raises(
        ValueError, match=rf"Argument `{argument}` has to be {text}.*but got {value!r}|{text}"
    ):
        KnowledgeRefreshCallback(**{argument: value})


@pytest.mark.parametrize(
    ("T", "epochs", "warned"), [(3, 3, True), (4, 3, True), (2, 3, False), (1, -1, False)]
)
def test_period_not_shorter_than_the_run(T, epochs, warned, recwarn):
    run = make_trainer(max_epochs=epochs, max_steps=2, callbacks=[make_refresh(T)])
    run.fit(wrap(PlainTowers()), make_loader())
    text = (
        f"KnowledgeRefreshCallback(T={T}) with max_epochs={epochs} builds the knowledge once and never renews"
    )
    assert any(text in str(warning.message) for warning in recwarn) == warned


def test_list_of_training_loaders_is_not_taken_for_batches():
    class Client(Towers):
        def training_step(self, batch, batch_idx):
            return self.contrast(self.encode_audio(batch[0]), self.encode_text(batch[1]))

    for several in ([make_loader(), make_loader()], {"a": make_loader(), "b": make_loader()}):
        with pytest.raises(TypeError, match=r"Pass KnowledgeRefreshCallback\(source=dataset\)"):
            make_trainer(callbacks=[make_refresh()]).fit(wrap(Client()), several)


def test_temperature_that_copies_would_read_from_the_original():
    model = PlainTowers()
    loss = ReliabilityOTLoss(temperature=lambda: model.audio_encoder.bias.exp().mean())
    with pytest.raises(ValueError, match=r"has to be a callable \(model\) here.*def tau\(model\)"):
        ASKModule(model, loss)


def test_temperature_under_a_name_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"`temperature` has to name an attribute of PlainTowers.*'tau'"):
        make_trainer(callbacks=[make_refresh()]).fit(
            wrap(PlainTowers(), {"temperature": "tau"}), make_loader()
        )


def test_temperature_that_has_been_trained_below_zero():
    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.tau = nn.Parameter(torch.tensor(0.01))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            with torch.no_grad():
                self.tau -= 0.1

    with pytest.raises(
        RuntimeError, match=r"temperature of ReliabilityOTLoss has become -0.*learn its logarithm"
    ):
        make_trainer(callbacks=[make_refresh()]).fit(wrap(Client(), {"temperature": "tau"}), make_loader())


@pytest.mark.parametrize("scale", ["logit_scale", lambda model: model.logit_scale.exp()])
def test_a_scale_that_is_passed_as_the_temperature_is_pointed_at_once(scale, recwarn):
    make_trainer(max_epochs=2).fit(ASKModule(InlineClient(), NTXentLoss(scale)), make_loader())
    told = [str(one.message) for one in recwarn if "reads from the model" in str(one.message)]
    assert len(told) == 1
    assert "return 1 / model.logit_scale.exp()" in told[0]


@pytest.mark.parametrize("temperature", [2.0, lambda model: 1 / model.logit_scale.exp()])
def test_a_temperature_that_is_one_is_not(temperature, recwarn):
    make_trainer(max_epochs=1).fit(ASKModule(InlineClient(), NTXentLoss(temperature)), make_loader())
    assert not [one for one in recwarn if "reads from the model" in str(one.message)]


def test_what_is_said_without_the_refresh_callback(recwarn):
    """A loss without knowledge needs none; temperature, idle parameters and single pairs are checked."""

    class Client(PlainTowers):
        def __init__(self):
            super().__init__()
            self.tau, self.head = nn.Parameter(torch.tensor(0.5)), nn.Linear(2, 2)

        def on_train_epoch_start(self):
            with torch.no_grad():
                self.tau -= 0.4 * self.current_epoch

    with pytest.raises(RuntimeError, match=r"temperature of NTXentLoss has become -0"):
        make_trainer().fit(ASKModule(Client(), NTXentLoss("tau")), make_loader())
    texts = [str(warning.message) for warning in recwarn]
    assert sum("The parameters head.weight, head.bias got no gradient" in text for text in texts) == 1
    loader = torch.utils.data.DataLoader(make_loader(9).dataset, 8)
    make_trainer(max_epochs=1).fit(ASKModule(PlainTowers(), NTXentLoss()), loader)
    texts = [str(warning.message) for warning in recwarn]
    assert sum("last batch of each epoch holds a single pair" in text for text in texts) == 1


def test_a_whole_encoder_in_a_reentrant_checkpoint():
    """It is not trained, and the reason is named."""

    class Checkpointed(PlainTowers):
        def encode_audio(self, batch):
            return checkpoint(self.audio_encoder, batch["audio"], use_reentrant=True)

    with pytest.warns(UserWarning, match=r"audio_encoder.weight, .*no gradient.*pass `use_reentrant=False`"):
        make_trainer(max_epochs=1).fit(ASKModule(Checkpointed(), NTXentLoss()), make_loader())


@pytest.mark.parametrize("client", [PlainTowers, Towers])
def test_keys_without_a_trainer_that_counts_steps(client):
    fabric = Fabric(accelerator="cpu", devices=1)
    module = fabric.setup_module(ASKModule(client(), MomentumContrastLoss(), ids="clip_id"))
    module.mark_forward_method("training_step")
    batch = next(iter(make_loader()))
    with pytest.raises(RuntimeError, match=r"MomentumContrastLoss follows .*Fabric.*loss\.make_keys"):
        module.training_step(batch, 0)
