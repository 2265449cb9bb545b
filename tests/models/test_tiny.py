"""The tiny model: it learns, hears and reads in order, and its checkpoints load."""

import lightning as L
import pytest
import torch

from ask_lightning.data import SoundscapeData, Soundscapes, collate_pairs
from ask_lightning.interaction import FrameWiseInteraction, PrototypeAttention
from ask_lightning.models import TinyRetriever
from tests.helpers.retrievers import noise


class Losses(L.Callback):
    """The training loss of the last batch of each epoch."""

    def __init__(self) -> None:
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append(trainer.callback_metrics["train/loss"].item())


def make_trainer(epochs: int, **options) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def small_data(**options) -> SoundscapeData:
    return SoundscapeData(
        **{"num_train": 16, "num_val": 4, "num_test": 4, "seconds": 1, "features": "log_mel", "batch_size": 8}
        | options
    )


@pytest.fixture(scope="module")
def trained():
    """A short run: small enough for every test session, long enough to learn something."""
    L.seed_everything(0, verbose=False)
    data = SoundscapeData(
        700, 100, 10, seconds=1.5, eval_captions_per_clip=1, features="log_mel", batch_size=16
    )
    model, losses = TinyRetriever(), Losses()
    run = make_trainer(5, callbacks=[losses])
    run.fit(model, datamodule=data)
    return model, data, losses.values, run


def test_the_loss_falls(trained):
    _, _, losses, _ = trained
    assert losses[-1] < 0.6 * losses[0]


def test_recall_is_far_above_chance(trained):
    _, _, _, run = trained
    chance = 10 / 100
    for direction in ("a2t", "t2a"):
        assert run.callback_metrics[f"val/{direction}/recall_at_10"] > 3 * chance
    recalls = [value for name, value in run.callback_metrics.items() if "recall_at" in name]
    assert run.callback_metrics["val/mean_recall"] == pytest.approx(torch.stack(recalls).mean().item())


def test_testing_logs_the_same_metrics_under_its_own_name(trained):
    model, data, _, _ = trained
    (scores,) = make_trainer(1).test(model, datamodule=data, verbose=False)
    assert {"test/t2a/recall_at_1", "test/a2t/map_at_10", "test/mean_recall"} <= set(scores)


def test_a_checkpoint_loads_with_its_hyperparameters(tmp_path):
    model = TinyRetriever(width=24, temperature=0.2, num_mels=32)
    run = make_trainer(1)
    run.fit(model, datamodule=small_data(num_mels=32))
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = TinyRetriever.load_from_checkpoint(tmp_path / "last.ckpt")
    assert (loaded.temperature, loaded.num_mels) == (0.2, 32)
    batch = collate_pairs(list(Soundscapes(3, seconds=1, features="log_mel", num_mels=32)))
    for encode in ("encode_audio", "encode_text"):
        with torch.no_grad():
            torch.testing.assert_close(
                getattr(loaded.eval(), encode)(batch), getattr(model.eval(), encode)(batch)
            )


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    def new():
        torch.manual_seed(0)
        return TinyRetriever(width=16)

    whole, resumed = new(), new()
    make_trainer(2).fit(whole, datamodule=small_data())

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    stopped = make_trainer(2, callbacks=[Stop()])
    stopped.fit(resumed, datamodule=small_data())
    stopped.save_checkpoint(tmp_path / "first.ckpt")
    again = new()
    make_trainer(2).fit(again, datamodule=small_data(), ckpt_path=tmp_path / "first.ckpt")
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, msg=name)


def test_embeddings_have_length_one_and_the_chosen_width():
    model = TinyRetriever(width=24)
    batch = collate_pairs(list(Soundscapes(3, seconds=1, features="log_mel", num_mels=64)))
    for embeddings in (model.encode_audio(batch), model.encode_text(batch)):
        assert embeddings.shape == (3, 24)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))


def test_waveforms_and_their_spectrograms_are_the_same_to_the_model():
    model = TinyRetriever(width=8).eval()
    heard = collate_pairs(list(Soundscapes(3, seconds=1)))
    seen = collate_pairs(list(Soundscapes(3, seconds=1, features="log_mel", num_mels=64)))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_audio(heard), model.encode_audio(seen))


def test_the_spectrogram_is_no_part_of_the_checkpoint():
    assert not [name for name in TinyRetriever(width=8).state_dict() if "mel" in name or "window" in name]


def test_order_counts_for_words_and_for_sounds():
    torch.manual_seed(0)
    model = TinyRetriever().eval()
    captions = ["rain, then wind", "wind, then rain"]
    sound = Soundscapes(1, seconds=1, features="log_mel")[0]["log_mel"]
    with torch.no_grad():
        text = model.encode_text({"caption": captions})
        audio = model.encode_audio({"log_mel": torch.stack([sound, sound.flip(0)])})
    assert (text[0] - text[1]).norm() > 0.01
    assert (audio[0] - audio[1]).norm() > 0.01


def test_training_tells_first_from_then(trained):
    """Captions with their two events exchanged are farther from their clips."""
    model, _, _, _ = trained
    clips = Soundscapes(300, split="train", seconds=1.5, features="log_mel")
    rows = [
        row
        for row, caption in enumerate(clips.captions)
        if ", then " in caption[0] and len(clips.scenes[row].events) == 2
    ]
    batch = collate_pairs([clips[row] for row in rows])
    turned = {"caption": [", then ".join(text.split(", then ")[::-1]) for text in batch["caption"]]}
    model.eval()
    with torch.no_grad():
        audio = model.encode_audio(batch)
        right = (audio * model.encode_text(batch)).sum(dim=1)
        wrong = (audio * model.encode_text(turned)).sum(dim=1)
    assert len(rows) >= 10
    assert (right > wrong).float().mean() > 0.7


def test_a_caption_without_words():
    with pytest.raises(ValueError, match="at least one word, but got '  '"):
        TinyRetriever(width=8).encode_text({"caption": ["rain", "  "]})


def test_spec_augment_in_training_only():
    model = TinyRetriever(width=8, masked_share=0.5)
    batch = {"log_mel": torch.rand(2, 50, 64)}
    assert not torch.equal(model.train().encode_audio(batch), model.encode_audio(batch))
    assert torch.equal(model.eval().encode_audio(batch), model.encode_audio(batch))
    model = TinyRetriever(width=8).train()
    assert torch.equal(model.encode_audio(batch), model.encode_audio(batch))


def test_padding_is_not_heard():
    torch.manual_seed(0)
    model = TinyRetriever(width=8).eval()
    clips = noise(3, 1.0, 16000)
    lengths = torch.tensor([16000, 9000, 0])
    # The end of a clip is reflected in its spectrogram, the end of a row is: silence looks the same in both.
    clips[1, 8400:] = 0
    with torch.no_grad():
        marked = model.encode_audio({"waveform": clips, "num_samples": lengths})
        torch.testing.assert_close(marked[:1], model.encode_audio({"waveform": clips[:1]}))
        torch.testing.assert_close(marked[1:2], model.encode_audio({"waveform": clips[1:2, :9000]}))
        assert (marked[1:2] - model.encode_audio({"waveform": clips[1:2]})).norm() > 1e-3
    assert marked.isfinite().all()


def test_very_short_clips():
    model = TinyRetriever(width=8).eval()
    for samples in (1, 100, 700):
        assert model.encode_audio({"waveform": noise(2, samples / 16000, 16000)}).isfinite().all(), samples


def test_waveforms_of_another_rate():
    torch.manual_seed(0)
    batch = {"waveform": noise(2, 1.0, 32000), "num_samples": torch.tensor([32000, 20000])}
    assert TinyRetriever(width=8, sample_rate=32000).encode_audio(batch).shape == (2, 8)


def test_schedules():
    def rates(**options):
        rates = []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer, *_):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        model = TinyRetriever(width=8, learning_rate=1.0, **options)
        make_trainer(5, callbacks=[Watch()], limit_val_batches=0).fit(model, datamodule=small_data())
        return rates

    assert rates(schedule="constant") == [1.0] * 10
    cosine = rates()
    assert cosine[:2] == [1.0, 1.0]
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert cosine[-1] < 0.05


def test_a_schedule_without_end():
    with pytest.raises(ValueError, match=r'Set `max_epochs` or `max_steps`.*`schedule="constant"`'):
        make_trainer(-1).fit(TinyRetriever(width=8), datamodule=small_data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` has to be positive, but got 0.0"),
        ({"schedule": "linear"}, r"`schedule` has to be one of \('cosine', 'constant'\), but got 'linear'"),
        ({"masked_share": 1.0}, r"`masked_share` has to be in \[0, 1\), but got 1.0"),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        TinyRetriever(**options)


def test_batches_that_do_not_fit():
    model = TinyRetriever(width=8)
    with pytest.raises(ValueError, match=r"'log_mel' or 'waveform', but got the keys \['caption'\]"):
        model.encode_audio({"caption": ["rain"]})
    with pytest.raises(ValueError, match="The batch has 32 mel bins, but the model 64"):
        model.encode_audio({"log_mel": torch.zeros(2, 50, 32)})
    with pytest.raises(ValueError, match=r"of shape \(B, T\), but got \(2, 1, 100\)"):
        model.encode_audio({"waveform": torch.zeros(2, 1, 100)})


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"), [("prototypes", PrototypeAttention), ("frames", FrameWiseInteraction)]
)
def test_frames_and_words(name, kind):
    torch.manual_seed(0)
    model = TinyRetriever(width=8, interaction=name).eval()
    assert type(model.interaction) is kind
    plain = TinyRetriever(width=8).eval()
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if "interaction" not in name})
    clips = noise(3, 1.0, 16000)
    clips[1, 8400:] = 0
    whole = {
        "waveform": clips,
        "num_samples": torch.tensor([16000, 9000, 0]),
        "caption": ["rain", "rain, then wind", "a dog"],
    }
    audio, text = model.encode_audio(whole), model.encode_text(whole)
    assert torch.equal(audio.pooled, plain.encode_audio(whole))
    assert torch.equal(text.pooled, plain.encode_text(whole))
    assert audio.valid.sum(dim=1).tolist() == [4, 3, 1]  # 63, 36 and 1 spectra
    assert text.valid.sum(dim=1).tolist() == [1, 4, 2]
    alone = {"waveform": clips[1:2, :9000], "caption": ["rain"]}
    frames, words = model.encode_audio(alone), model.encode_text(alone)
    torch.testing.assert_close(audio.tokens[1][audio.valid[1]], frames.tokens[0])
    torch.testing.assert_close(text.tokens[0][text.valid[0]], words.tokens[0])
    # A caption of one word is its word.
    torch.testing.assert_close(words.tokens[:, 0], words.pooled)
    for side in (audio, text):
        torch.testing.assert_close(side.tokens.norm(dim=2), torch.ones(side.tokens.shape[:2]))


def test_training_with_an_interaction(tmp_path):
    model = TinyRetriever(width=16, interaction="prototypes")
    run = make_trainer(1)
    before = model.interaction.prototypes.detach().clone()
    run.fit(model, datamodule=small_data(features=None))
    assert not torch.equal(model.interaction.prototypes, before)
    assert 0 <= run.callback_metrics["val/mean_recall"] <= 1
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = TinyRetriever.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(loaded.interaction.prototypes, model.interaction.prototypes)
    with pytest.raises(ValueError, match="`interaction` has to be one of"):
        TinyRetriever(interaction="words")
