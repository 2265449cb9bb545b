"""A batch in chunks has the loss, the gradient and the side effects of the batch as a whole."""

import copy
import inspect
import pickle
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import ask_lightning.losses
from ask_lightning import ASKModule, KnowledgeBase, NTXentLoss, ReliabilityOTLoss
from ask_lightning.interaction import PrototypeAttention, TokenEmbeddings
from ask_lightning.losses import MomentumContrastLoss
from tests.helpers.clients import AUDIO, TEXT, WIDTH, MemoryLogger, Pairs, Towers, make_trainer
from tests.helpers.kept_bytes import kept_bytes

BATCH, CHUNK = 12, 5  # three chunks of four
LOSSES = [
    kind
    for name in ask_lightning.losses.__all__
    if not inspect.isabstract(kind := getattr(ask_lightning.losses, name))
]


class Restless(Towers):
    """Draws random numbers from every stream, and counts in a buffer what it has seen."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.temperature, self.bias = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(-2.0))
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.LayerNorm(WIDTH)
        self.own_stream = torch.Generator().manual_seed(3)
        self.register_buffer("seen", torch.zeros(()))

    def encode_audio(self, batch):
        self.seen += len(batch["audio"])
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.random()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            scale += 0.1 * float(torch.rand(()))
        noise = torch.rand(len(batch["audio"]), WIDTH, generator=self.own_stream)
        return self.norm(self.audio_encoder(self.dropout(batch["audio"]))) * scale + 0.1 * noise

    def encode_text(self, batch):
        return dropout(self.norm(self.text_encoder(batch["text"])), 0.2, self.training)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def in_parts(encode):
    """The reference: chunks whose graphs are all kept."""

    def encoded(model, batch):
        parts = [
            {key: value[rows] for key, value in batch.items()}
            for rows in torch.arange(len(batch["audio"])).tensor_split(3)
        ]
        return torch.cat([getattr(model, encode)(part) for part in parts])

    return encoded


REFERENCE = {"audio": in_parts("encode_audio"), "text": in_parts("encode_text"), "step": "encode"}


def pairs_loader() -> DataLoader:
    return DataLoader(Pairs(3 * BATCH), BATCH)


def make_loss(kind, **options):
    loss = kind(**options)
    if loss.needs_knowledge:
        stored = Pairs(40, seed=5)
        loss.knowledge = KnowledgeBase.from_embeddings(
            stored.audio[:, :WIDTH].double(),
            stored.text[:, :WIDTH].double(),
            ids=stored.clip_id,
            num_prototypes=6,
        )
    return loss


def trained(make_model, loss, options, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a run of three steps an epoch."""
    pl.seed_everything(1, verbose=False)
    model, losses = make_model(), []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    run = make_trainer(**({"max_epochs": 2, "callbacks": [Losses()], "precision": "64-true"} | settings))
    run.fit(ASKModule(model, loss, ids="clip_id", **options), pairs_loader())
    return losses, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_run(chunked, reference, tolerance=1e-10):
    assert chunked[0] == pytest.approx(reference[0], rel=tolerance, abs=tolerance)
    for name, value in reference[1].items():
        torch.testing.assert_close(chunked[1][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_trains_as_if_all_graphs_were_kept(kind):
    taken = inspect.signature(kind).parameters
    options = {name: name for name in ("temperature", "bias") if name in taken}
    options |= {"num_neighbors": 4} if "num_neighbors" in taken else {}
    chunked, reference = (
        trained(Restless, make_loss(kind, **options), settings)
        for settings in ({"step": "encode", "chunk_size": CHUNK}, REFERENCE)
    )
    assert_same_run(chunked, reference)
    assert chunked[1]["seen"] == 2 * 3 * BATCH


def test_the_gradient_is_that_of_the_whole_batch():
    for precision, tolerance in (("64-true", 1e-10), ("32-true", 1e-6)):
        chunked, whole = (
            trained(Towers, NTXentLoss(), {"step": "encode"} | options, precision=precision)
            for options in ({"chunk_size": CHUNK}, {})
        )
        assert_same_run(chunked, whole, tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "16-mixed"},
    ],
)
def test_options_of_the_trainer(settings):
    def fit(options):
        plugins = {}
        if settings.get("precision") == "16-mixed":  # with the name alone Lightning takes bfloat16 on a CPU
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "precision": None}
        return trained(Restless, NTXentLoss("temperature"), options, **(settings | plugins))

    tolerance = 1e-2 if "precision" in settings else 1e-10
    chunked = fit({"step": "encode", "chunk_size": CHUNK})
    assert_same_run(chunked, fit(REFERENCE), tolerance)
    assert not torch.equal(chunked[1]["audio_encoder.weight"], Restless().audio_encoder.weight)


class Stepping(Restless):
    """Has a step of its own, which logs, counts and adds a term to its contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.encoded = 0, []

    def encode_audio(self, batch):
        self.log("train/rows", float(len(batch["audio"])), batch_size=len(batch["audio"]))
        self.encoded.append(len(batch["audio"]))
        return super().encode_audio(batch)

    def loss_fn(self, audio, text):
        return self.contrast(audio, text)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        audio, text = self.encode_audio(batch), self.encode_text(batch)
        size = 0.1 * audio.square().mean()
        self.log("train/size", size)
        return self.loss_fn(audio, text) + size


class SteppingInParts(Stepping):
    """The reference for it: chunks whose graphs are all kept."""

    def training_step(self, batch, batch_idx):
        whole, cut = (self.encode_audio, self.encode_text), []
        for encode in whole:
            cut.append(in_parts(encode.__name__)(self, batch))
        size = 0.1 * cut[0].square().mean()
        self.log("train/size", size)
        return self.loss_fn(*cut) + size


def test_criterion_keeps_the_other_terms_of_the_step():
    logger = MemoryLogger()
    chunked = trained(
        Stepping,
        NTXentLoss(),
        {"criterion": "loss_fn", "chunk_size": CHUNK},
        logger=logger,
        log_every_n_steps=1,
    )
    assert_same_run(chunked, trained(SteppingInParts, NTXentLoss(), {"criterion": "loss_fn"}))
    assert len(logger.values("train/size")) == 6


@pytest.mark.parametrize("loss", [NTXentLoss, MomentumContrastLoss])
def test_capture_runs_the_step_once(loss):
    models, logger = [], MemoryLogger()
    chunked = trained(
        lambda: models.append(Stepping()) or models[0],
        loss(),
        {"chunk_size": CHUNK},
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
    )
    assert_same_run(chunked, trained(Restless, loss(), REFERENCE, max_epochs=1))
    (model,) = models
    assert model.steps == 3
    assert model.encoded == [4] * (3 * 3 * 2)
    assert logger.values("train/rows") == [4.0] * 3  # the second pass logs nothing
    assert len(logger.values("train/size")) == 3


def test_capture_without_a_call_is_refused():
    class Inner(Towers):
        def training_step(self, batch, batch_idx):
            return self.loss_fn(self.audio_encoder(batch["audio"]), self.text_encoder(batch["text"]))

        def loss_fn(self, audio, text):
            return self.contrast(audio, text)

    with pytest.raises(
        RuntimeError, match=r"no effect, because Inner.training_step does not call `self.enc.*Name"
    ):
        trained(Inner, NTXentLoss(), {"criterion": "loss_fn", "chunk_size": CHUNK})


class TokenTowers(Towers):
    """Sentences of different lengths, padded to the longest of what is encoded together."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.interaction = PrototypeAttention(WIDTH, 3)

    def encode_audio(self, batch):
        frames = self.audio_encoder(batch["audio"])[:, None] * torch.arange(1, 4)[None, :, None]
        return TokenEmbeddings(frames.mean(dim=1), frames.tanh())

    def encode_text(self, batch):
        lengths = 1 + batch["clip_id"] % 12
        valid = torch.arange(int(lengths.max())) < lengths[:, None]
        words = self.text_encoder(batch["text"])[:, None] * torch.arange(1, valid.shape[1] + 1)[None, :, None]
        return TokenEmbeddings(words[:, 0], words.tanh(), valid)


@pytest.mark.parametrize("kind", [NTXentLoss, ReliabilityOTLoss])
def test_tokens(kind):
    options = {"interaction": "interaction"} | ({"num_neighbors": 4} if kind is ReliabilityOTLoss else {})
    chunked, whole = (
        trained(TokenTowers, make_loss(kind, **options), {"step": "encode"} | chunks)
        for chunks in ({"chunk_size": CHUNK}, {})
    )
    assert_same_run(chunked, whole)
    torch.manual_seed(0)
    assert not torch.equal(chunked[1]["interaction.prototypes"], TokenTowers().interaction.prototypes)


def test_hooks_of_parameters_see_the_gradient_of_the_batch_once():
    seen = []

    class Hooked(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.audio_encoder.weight.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)

    chunked, whole = (
        trained(Hooked, NTXentLoss(), {"step": "encode"} | options) for options in ({"chunk_size": CHUNK}, {})
    )
    assert_same_run(chunked, whole)
    assert len(seen) == 2 * 6
    torch.testing.assert_close(seen[0], seen[6])


def test_a_frozen_encoder_is_run_once():
    calls = []

    class Frozen(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.text_encoder.requires_grad_(False)

        def encode_text(self, batch):
            calls.append(len(batch["text"]))
            return super().encode_text(batch)

    trained(Frozen, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK}, max_epochs=1)
    assert calls == [4] * 9


class Normed(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(AUDIO)

    def encode_audio(self, batch):
        return self.audio_encoder(self.norm(batch["audio"]))


def test_batch_norm_is_warned_of_and_its_statistics_move_once():
    with pytest.warns(
        UserWarning, match="norm of Normed take the statistics .* are those of each chunk"
    ) as seen:
        chunked = trained(Normed, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})
    assert len([one for one in seen if "of each chunk" in str(one.message)]) == 1
    assert_same_run(chunked, trained(Normed, NTXentLoss(), REFERENCE))
    assert chunked[1]["norm.num_batches_tracked"] == 2 * 3 * 3


def test_batch_norm_over_ranks_is_refused():
    def synchronised():
        return nn.SyncBatchNorm.convert_sync_batchnorm(Normed())

    with pytest.raises(RuntimeError, match=r"synchronised over ranks \(norm\). Leave `sync_batchnorm` out"):
        trained(synchronised, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})


def test_buffers_that_the_embeddings_depend_on():
    """As in spectral norm, whose vectors move with each pass in training mode."""

    class Spectral(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.audio_encoder = nn.utils.parametrizations.spectral_norm(self.audio_encoder)

    chunked = trained(Spectral, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})
    assert_same_run(chunked, trained(Spectral, NTXentLoss(), REFERENCE))


class Checkpointed(Towers):
    """Keeps no activations of its audio encoder."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def encode_audio(self, batch):
        waveform = batch["audio"].clone().requires_grad_(self.reentrant)
        return self.head(checkpoint(self.inner, waveform, use_reentrant=self.reentrant))

    def inner(self, waveform):
        return dropout(self.audio_encoder(waveform).tanh(), 0.2)


def test_checkpoints_inside_of_an_encoder():
    chunked = trained(Checkpointed, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})
    assert_same_run(chunked, trained(Checkpointed, NTXentLoss(), REFERENCE))


def test_reentrant_checkpoints_are_refused():
    """Their parameters are not in the graph, so that they would stay without a gradient."""

    class Reentrant(Checkpointed):
        reentrant = True

    with pytest.raises(
        RuntimeError, match=r"`encode_audio` uses reentrant checkpoints.*`use_reentrant=False`"
    ):
        trained(Reentrant, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})


def test_embeddings_that_change_with_each_call_are_noticed():
    class Counting(Towers):
        calls = 0

        def encode_audio(self, batch):
            self.calls += 1
            return super().encode_audio(batch) + self.calls

    with pytest.raises(
        RuntimeError, match="`encode_audio` returned other embeddings when it encoded a chunk again"
    ):
        trained(Counting, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})


def test_a_small_batch_is_encoded_as_a_whole():
    class Seeing(Towers):
        def encode_audio(self, batch):
            assert len(batch["audio"]) == BATCH
            return super().encode_audio(batch)

    trained(Seeing, NTXentLoss(), {"step": "encode", "chunk_size": BATCH}, max_epochs=1)


def test_validation_and_the_random_streams_are_those_of_a_run_without_chunks():
    class Drawing(Towers):
        def on_train_batch_end(self, *_):
            self.drawn = (float(torch.rand(())), random.random(), np.random.random())  # noqa: NPY002

    drawn = []
    for options in ({"chunk_size": CHUNK}, {}):
        model = Drawing()
        trained(lambda model=model: model, NTXentLoss(), {"step": "encode"} | options)
        drawn.append(model.drawn)
    assert drawn[0] == drawn[1]


def test_arguments_of_any_kind_in_a_step():
    class Passing(Towers):
        def encode_audio(self, waveform, scale, *, rows):
            assert len(rows) == len(waveform)
            return scale * self.audio_encoder(waveform)

        def training_step(self, batch, batch_idx):
            rows = [str(row) for row in batch["clip_id"].tolist()]
            return self.contrast(self.encode_audio(batch["audio"], 2, rows=rows), self.encode_text(batch))

    chunked, whole = (trained(Passing, NTXentLoss(), {} | options) for options in ({"chunk_size": CHUNK}, {}))
    assert_same_run(chunked, whole)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="`chunk_size` has to be an integer of at least 1, but got"):
        ASKModule(Towers(), NTXentLoss(), chunk_size=size)


def test_callables_in_a_step_of_the_model_are_refused():
    options = {"audio": in_parts("encode_audio"), "text": in_parts("encode_text"), "criterion": "loss_fn"}
    with pytest.raises(
        ValueError, match=r'With step="criterion", `chunk_size` needs .*got encoded and encoded'
    ):
        ASKModule(Stepping(), NTXentLoss(), chunk_size=4, **options)


def test_a_compiled_wrapper_is_refused():
    module = torch.compile(ASKModule(Towers(), NTXentLoss(), step="encode", chunk_size=4), backend="eager")
    with pytest.raises(RuntimeError, match=r"cannot be combined with torch.compile.*Compile the encoders"):
        make_trainer(max_epochs=1).fit(module, pairs_loader())


def test_a_compiled_encoder():
    class Compiled(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.run = torch.compile(self.audio_encoder, backend="aot_eager")

        def encode_audio(self, batch):
            return self.run(batch["audio"])

    chunked = trained(Compiled, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})
    assert_same_run(chunked, trained(Compiled, NTXentLoss(), {"step": "encode"}))


@pytest.mark.parametrize(
    ("encode", "error", "message"),
    [
        (
            lambda self, batch: self.audio_encoder(batch["audio"]).mean(),
            ValueError,
            "a single number for a chunk",
        ),
        (
            lambda self, batch: self.audio_encoder(batch["audio"])[:1],
            ValueError,
            "needs an embedding for each row, but `encode_audio` returned 1 rows for a chunk of 4",
        ),
    ],
)
def test_outputs_without_a_row_for_each_pair(encode, error, message):
    model = type("Model", (Towers,), {"encode_audio": encode})
    with pytest.raises(error, match=message):
        trained(model, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK})


def test_outputs_that_cannot_be_joined_in_a_step():
    class Output:
        def __init__(self, embeddings):
            self.pooler_output = embeddings

    class Model(Towers):
        def encode_audio(self, batch):
            return Output(super().encode_audio(batch))

        def training_step(self, batch, batch_idx):
            return self.contrast(self.encode_audio(batch).pooler_output, self.encode_text(batch))

    with pytest.raises(TypeError, match=r'to return a tensor .* but got a Output.* or use step="encode"'):
        trained(Model, NTXentLoss(), {"chunk_size": CHUNK})
    trained(Model, NTXentLoss(), {"step": "encode", "chunk_size": CHUNK}, max_epochs=1)


def test_an_encoder_that_takes_what_was_computed_for_the_whole_batch():
    class Model(Towers):
        def encode_audio(self, features):
            return features.tanh()

        def training_step(self, batch, batch_idx):
            return self.contrast(
                self.encode_audio(self.audio_encoder(batch["audio"])), self.encode_text(batch)
            )

    with pytest.raises(
        ValueError, match="batch without gradient, but argument 1 was computed from parameters"
    ):
        trained(Model, NTXentLoss(), {"chunk_size": CHUNK})


def test_a_checkpoint_holds_the_size(tmp_path):
    wrapped = ASKModule(Towers(), NTXentLoss(), chunk_size=4)
    checkpoint = {"state_dict": wrapped.state_dict()}
    wrapped.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    restored = ASKModule.load_from_checkpoint(tmp_path / "a.ckpt", Towers())
    assert restored._options()["chunk_size"] == 4
    for copied in (copy.deepcopy(restored), pickle.loads(pickle.dumps(restored))):
        make_trainer(max_epochs=1).fit(copied, pairs_loader())


def test_activations_of_one_chunk_are_kept():
    """Counted are the bytes that autograd keeps for the backward pass, which are all of the encoders'."""

    class Deep(Towers):
        def __init__(self) -> None:
            super().__init__()
            layers = [part for _ in range(8) for part in (nn.Linear(128, 128), nn.GELU())]
            self.audio_encoder = nn.Sequential(nn.Linear(AUDIO, 128), *layers, nn.Linear(128, WIDTH))
            self.text_encoder = nn.Sequential(nn.Linear(TEXT, 128), *layers, nn.Linear(128, WIDTH))

    def most_bytes(chunk_size):
        torch.manual_seed(0)
        module = ASKModule(Deep(), NTXentLoss(), step="encode", chunk_size=chunk_size)
        batch = dict(zip(("audio", "text"), (Pairs(128).audio, Pairs(128).text), strict=True))
        module.trainer = make_trainer()
        with kept_bytes() as most:
            module.training_step(batch).backward()
        return most.most

    whole, chunks_of_64, chunks_of_16 = (most_bytes(size) for size in (None, 64, 16))
    assert chunks_of_64 < whole / 3
    assert chunks_of_16 < whole / 7
