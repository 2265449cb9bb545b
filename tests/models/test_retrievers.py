"""The published models as LightningModules: they train, forget no checkpoint, and mind only their own row."""

import copy
import json
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from ask_lightning import ASKModule, KnowledgeRefreshCallback, ReliabilityOTLoss
from ask_lightning.models import ResNet38BERT
from tests.helpers.clients import make_trainer
from tests.helpers.retrievers import MODELS, Recordings, batch_for, clap, noise, resnet38_bert

transformers = pytest.importorskip("transformers")
torchaudio = pytest.importorskip("torchaudio")

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def encoded(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode_audio(batch), model.encode_text(batch)


def make_loader(model, batch_size: int = 4) -> DataLoader:
    return DataLoader(Recordings(model.resample.from_rate), batch_size)


@every_model
def test_embeddings_have_length_one_and_one_width(make):
    model = make()
    for embeddings in encoded(model, batch_for(model)):
        assert embeddings.shape == (4, 8)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))


@every_model
def test_rows_do_not_depend_on_their_companions(make):
    """Text is padded to the longest caption: that must not change the shorter ones."""
    torch.manual_seed(0)
    model = make().eval()
    batch = batch_for(model)
    audio, text = encoded(model, batch)
    for row in range(4):
        alone = {"waveform": batch["waveform"][row : row + 1], "caption": batch["caption"][row : row + 1]}
        for together, single in zip((audio, text), encoded(model, alone), strict=True):
            torch.testing.assert_close(together[row : row + 1], single, rtol=1e-4, atol=1e-5)
    assert (text[0] - text[2]).norm() > 1e-3
    assert (audio[0] - audio[2]).norm() > 1e-6


@every_model
def test_padding_of_clips_is_not_heard(make):
    torch.manual_seed(0)
    model = make().eval()
    rate = model.resample.from_rate
    clip = noise(1, 0.75, rate)
    # The end of a clip is reflected in its spectrogram, the end of a row is: silence looks the same in both.
    clip[:, -1024:] = 0
    padded = torch.nn.functional.pad(clip, (0, rate // 2))
    alone = model.encode_audio({"waveform": clip})
    counted = {"waveform": padded, "num_samples": torch.tensor([clip.shape[1]])}
    marked, unmarked = model.encode_audio(counted), model.encode_audio({"waveform": padded})
    torch.testing.assert_close(marked, alone, rtol=1e-3, atol=1e-4)
    assert (unmarked - alone).norm() > 1e-3
    assert model.encode_audio(counted | {"num_samples": torch.tensor([0])}).isfinite().all()


@every_model
def test_very_short_and_long_clips(make):
    model = make().eval()
    rate = model.resample.from_rate
    for samples in (1, 100, 12 * rate):
        waveform = noise(2, samples / rate, rate)
        assert model.encode_audio({"waveform": waveform}).isfinite().all(), samples


@every_model
def test_masks_and_dropout_in_training_only(make):
    torch.manual_seed(0)
    model = make(**({"spec_augment": True} if make is MODELS["ced_sonar"] else {}))
    batch = batch_for(model, seconds=2.0)
    first, second = encoded(model.eval(), batch), encoded(model, batch)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    first, second = encoded(model.train(), batch), encoded(model, batch)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_spec_augment_and_dropout_can_be_switched_off():
    torch.manual_seed(0)
    for make in (MODELS["resnet38_bert"], MODELS["ced_sonar"]):
        quiet = {"dropout": 0.0} if make is MODELS["resnet38_bert"] else {}
        for spec_augment in (False, True):
            model = make(spec_augment=spec_augment, **quiet)
            batch = batch_for(model)
            one, other = model.encode_audio(batch), model.encode_audio(batch)
            assert torch.equal(one, other) == (not spec_augment)


@every_model
def test_every_weight_that_is_trained_gets_a_gradient(make):
    """DDP stops at weights without one."""
    model = make(temperature=1.0)
    batch = batch_for(model)
    model.loss(model.encode_audio(batch), model.encode_text(batch)).backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert not [name for name, weight in trained.items() if weight.grad is None]
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == ({"model.logit_scale_a", "model.logit_scale_t"} if make is clap else set())
    (group,) = model.configure_optimizers()["optimizer"].param_groups
    assert len(group["params"]) == len(trained)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make, dtype):
    torch.manual_seed(0)
    model = make().eval()
    batch = batch_for(model)
    expected = encoded(model, batch)
    with torch.autocast("cpu", dtype):
        found = encoded(model, batch)
        loss = model.loss(*found)
    assert loss.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm(dim=1).max() < 0.1


@every_model
def test_all_in_bfloat16(make):
    model = make()
    batch = batch_for(model)
    run = make_trainer(max_steps=1, precision="bf16-true", num_sanity_val_steps=0, limit_val_batches=0)
    run.fit(model, make_loader(model))
    model.to(torch.bfloat16)
    for embeddings in encoded(model, batch | {"waveform": batch["waveform"].bfloat16()}):
        assert embeddings.isfinite().all()


@every_model
def test_another_sample_rate(make):
    torch.manual_seed(0)
    model = make().eval()
    rate = model.resample.to_rate
    torch.manual_seed(0)
    other = make(sample_rate=2 * rate).eval()
    fast = noise(2, 1.0, 2 * rate)
    slow = torchaudio.functional.resample(fast, 2 * rate, rate)
    lengths = torch.tensor([2 * rate, rate])
    expected = model.encode_audio({"waveform": slow, "num_samples": lengths // 2})
    torch.testing.assert_close(other.encode_audio({"waveform": fast, "num_samples": lengths}), expected)


@every_model
def test_ask_trains_it(make):
    """Two steps, with the knowledge built before them."""
    L.seed_everything(0, verbose=False)
    model = make()
    before = copy.deepcopy(model.state_dict())
    module = ASKModule(model, ReliabilityOTLoss(num_neighbors=3))
    assert module.ask_step == "capture"
    run = make_trainer(max_steps=2, max_epochs=1, callbacks=[KnowledgeRefreshCallback(T=1, num_prototypes=4)])
    run.fit(module, make_loader(model), make_loader(model))
    assert module.loss.knowledge.fine.audio.shape == (12, 8)
    assert run.callback_metrics["train/loss"].isfinite()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {"model.audio_model", "model.text_model"} if make is clap else {"audio_encoder", "text_encoder"}
    for part in parts:
        assert any(name.startswith(part) for name in moved), part


@every_model
def test_it_trains_alone_and_its_checkpoint_loads(make, tmp_path):
    model = make(learning_rate=1e-3, temperature=0.2)
    run = make_trainer(max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, make_loader(model), make_loader(model))
    assert {"train/loss", "val/mean_recall", "val/t2a/mean_recall", "val/a2t/recall_at_1"} <= set(
        run.callback_metrics
    )
    (scores,) = run.test(model, make_loader(model), verbose=False)
    assert {"test/t2a/map_at_10", "test/mean_recall"} <= set(scores)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "last.ckpt")
    assert (loaded.temperature, loaded.learning_rate) == (0.2, 1e-3)
    batch = batch_for(model)
    for mine, other in zip(encoded(loaded.eval(), batch), encoded(model.eval(), batch), strict=True):
        torch.testing.assert_close(mine, other)
    json.dumps(dict(model.hparams))
    assert not [name for name in model.state_dict() if "log_mel" in name or "resample" in name]


def test_a_checkpoint_needs_neither_the_published_files_nor_a_network(tmp_path):
    """What was fine-tuned from a folder loads after the folder is gone, its tokenizer included."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sound", "number", *map(str, range(12))]
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8)).save_pretrained(folder)
    panns = {"model": resnet38_bert().audio_encoder.state_dict()}
    torch.save(panns, tmp_path / "panns.pth")

    passed = {"audio_weights": str(tmp_path / "panns.pth"), "text_weights": str(folder)}
    model = resnet38_bert(**passed, text_config=None, tokenizer=None, dropout=0.3)
    for name, value in panns["model"].items():
        assert torch.equal(model.audio_encoder.state_dict()[name], value), name
    logger = CSVLogger(tmp_path)
    run = make_trainer(max_epochs=1, logger=logger, callbacks=[KnowledgeRefreshCallback(num_prototypes=4)])
    module = ASKModule(model, ReliabilityOTLoss(num_neighbors=3))
    run.fit(module, make_loader(model), make_loader(model))
    run.save_checkpoint(tmp_path / "last.ckpt")
    noted = (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()
    assert str(folder) in noted, "loggers say where the weights came from"

    shutil.rmtree(folder)
    (tmp_path / "panns.pth").unlink()
    loaded = ResNet38BERT.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams["text_weights"] is None
    assert loaded.text_encoder.model.embeddings.dropout.p == 0.3
    batch = batch_for(model)
    for mine, other in zip(encoded(loaded.eval(), batch), encoded(model.eval(), batch), strict=True):
        torch.testing.assert_close(mine, other)
    again = ResNet38BERT(**loaded.hparams)
    with pytest.raises(RuntimeError, match="The tokenizer has no vocabulary yet"):
        again.encode_text(batch)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.eval().encode_text(batch), loaded.encode_text(batch))


@every_model
def test_the_learning_rate_falls_in_steps_of_epochs(make):
    rates = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = make(learning_rate=1e-3, decay_epochs=2, decay_factor=0.5)
    run = make_trainer(max_epochs=5, callbacks=[Watch()], limit_val_batches=0, limit_train_batches=1)
    run.fit(model, make_loader(model, 2))
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])


@every_model
def test_batches_that_do_not_fit(make):
    model = make()
    with pytest.raises(ValueError, match=r"has to hold 'waveform', but got the keys \['log_mel'\]"):
        model.encode_audio({"log_mel": torch.zeros(2, 100, 64)})
    with pytest.raises(ValueError, match=r"of shape \(B, T\), but got \(2, 1, 100\)"):
        model.encode_audio({"waveform": torch.zeros(2, 1, 100)})


@every_model
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` has to be positive, but got 0.0"),
        ({"learning_rate": -1.0}, "`learning_rate` has to be positive, but got -1.0"),
        ({"decay_epochs": 0}, "`decay_epochs` has to be an integer of at least 1, but got 0"),
        ({"decay_factor": 1.5}, r"`decay_factor` has to be in \(0, 1\], but got 1.5"),
        ({"sample_rate": 0}, "`sample_rate` has to be an integer of at least 1, but got 0"),
    ],
)
def test_arguments_outside_their_range(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
