"""The metric: streaming, ids, torchmetrics' life cycle, and a Lightning run."""

import copy
import pickle
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from ask_lightning.metrics import (
    CALIBRATIONS,
    AudioTextRetrieval,
    QueryBank,
    calibrated_ranks,
    choose_calibration,
    retrieval_ranks,
    retrieval_scores,
)
from ask_lightning.metrics import retrieval as retrieval_module
from ask_lightning.utilities.clip_ids import integer_ids
from tests.helpers.hubs import hubby_pairs
from tests.helpers.retrieval_reference import noisy_pairs, reference_scores

NAMES = [
    f"{direction}/{name}"
    for direction in ("a2t", "t2a")
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "map_at_10", "median_rank")
]


def update_in_batches(metrics, pairs, batch_size=17):
    for batch in zip(*(rows.split(batch_size) for rows in pairs), strict=True):
        metrics.update(*batch)
    return metrics


def direct(pairs):
    return retrieval_scores(retrieval_ranks(*pairs))


@pytest.fixture
def count_rankings(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return retrieval_ranks(*args, **kwargs)

    monkeypatch.setattr(retrieval_module, "retrieval_ranks", counted)
    return calls


def test_names_are_stable():
    assert list(AudioTextRetrieval().score_names) == NAMES
    assert list(update_in_batches(AudioTextRetrieval(), noisy_pairs()).compute()) == NAMES
    others = AudioTextRetrieval(top_k=[3], map_k=4).score_names
    assert others[:3] == ("a2t/recall_at_3", "a2t/map_at_4", "a2t/median_rank")


def test_stream_is_ranked_once_and_equals_the_reference(count_rankings):
    pairs = noisy_pairs()
    metrics = update_in_batches(AudioTextRetrieval(), pairs)
    scores = metrics.compute()
    assert len(count_rankings) == 1
    expected = reference_scores(*map(np.asarray, pairs))
    assert {name: score.item() for name, score in scores.items()} == pytest.approx(expected, abs=1e-6)
    assert all(score.dtype == torch.float32 and score.ndim == 0 for score in scores.values())
    assert update_in_batches(AudioTextRetrieval(), pairs, 90).compute() == scores


def test_update_after_compute_is_counted():
    pairs = noisy_pairs()
    metrics = AudioTextRetrieval()
    metrics.update(*(rows[:40] for rows in pairs))
    assert metrics.compute() == direct([rows[:40] for rows in pairs])
    metrics.update(*(rows[40:] for rows in pairs))
    assert metrics.compute() == direct(pairs)


def test_reset_forgets():
    metrics = update_in_batches(AudioTextRetrieval(), noisy_pairs(seed=1))
    metrics.compute()
    metrics.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="no rows"):
        metrics.compute()
    assert update_in_batches(metrics, noisy_pairs(seed=2)).compute() == direct(noisy_pairs(seed=2))


def test_a_clone_has_its_own_rows():
    metric = update_in_batches(AudioTextRetrieval(), noisy_pairs(seed=1))
    clone = metric.clone()
    clone.reset()
    update_in_batches(clone, noisy_pairs(seed=2))
    assert clone.compute() == direct(noisy_pairs(seed=2))
    assert metric.compute() == direct(noisy_pairs(seed=1))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda metrics: pickle.loads(pickle.dumps(metrics))])
def test_copies_and_pickles_keep_their_rows(duplicate, count_rankings):
    metrics = duplicate(update_in_batches(AudioTextRetrieval(), noisy_pairs()))
    metrics.update(*noisy_pairs(seed=3))
    both = [torch.cat(rows) for rows in zip(noisy_pairs(), noisy_pairs(seed=3), strict=True)]
    assert metrics.compute() == direct(both)
    assert len(count_rankings) == 1


def test_forward_returns_the_batch_and_keeps_it():
    metric, pairs = AudioTextRetrieval(), noisy_pairs()
    for part in (slice(0, 40), slice(40, 90)):
        batch = [rows[part] for rows in pairs]
        assert metric(*batch) == direct(batch)
    assert metric.compute() == direct(pairs)


def test_strings_and_integers_are_equally_good_ids():
    audio, text, clip_ids = noisy_pairs()
    expected = direct((audio, text, clip_ids))
    for ids in ([f"{i}.wav" for i in clip_ids.tolist()], clip_ids.tolist(), clip_ids.numpy(), clip_ids.int()):
        metric = AudioTextRetrieval()
        metric.update(audio, text, ids)
        scores = metric.compute()
        # Another numbering of the clips may sum the precisions in another order.
        assert {k: v.item() for k, v in scores.items()} == pytest.approx(
            {k: v.item() for k, v in expected.items()}
        )


def test_string_ids_are_the_same_in_every_run():
    assert integer_ids(["dog.wav", "犬"]).tolist() == [-1876960626151427282, -7109239311053964996]


def test_bfloat16_is_ranked_as_it_is():
    audio, text, clip_ids = noisy_pairs()
    metric = AudioTextRetrieval()
    metric.update(audio.bfloat16(), text.bfloat16(), clip_ids)
    assert metric.compute() == direct((audio.bfloat16().float(), text.bfloat16().float(), clip_ids))


def test_rows_neither_keep_a_graph_nor_what_they_are_a_view_of():
    tokens = torch.randn(6, 50, 8, requires_grad=True)
    metric = AudioTextRetrieval()
    metric.update(tokens[:, 0], tokens[:, 1], torch.arange(6))
    for rows in (metric.audio[0], metric.text[0]):
        assert not rows.requires_grad
        assert rows.untyped_storage().nbytes() == 6 * 8 * 4


def test_caption_ids_drop_repeated_rows():
    pairs = noisy_pairs()
    caption_ids = torch.arange(len(pairs[0]))
    padded = [torch.cat([rows, rows[:5]]) for rows in (*pairs, caption_ids)]
    metrics = update_in_batches(AudioTextRetrieval(), padded)
    assert metrics.compute() == direct(pairs)
    without_ids = update_in_batches(AudioTextRetrieval(), padded[:3])
    assert without_ids.compute() != direct(pairs)


def test_caption_ids_may_start_again_at_each_clip():
    audio, text, clip_ids = noisy_pairs()
    number_in_clip = torch.tensor([(clip_ids[:row] == clip_ids[row]).sum() for row in range(len(clip_ids))])
    metric = AudioTextRetrieval()
    metric.update(audio, text, clip_ids, number_in_clip)
    assert metric.compute() == direct((audio, text, clip_ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3), [0, 1]), "`audio` has to be a floating tensor"),
        (
            (torch.ones(2, 3), torch.ones(2, 4), [0, 1]),
            r"`text` has to be of the same shape as `audio`, \(2, 3\)",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3), ["a"]),
            r"`clip_ids` has to be integers of shape \(2,\), one for each row",
        ),
        ((torch.ones(2, 3), torch.ones(2, 3), "ab"), "`clip_ids` has to be a sequence of ids .* string 'ab'"),
        (
            (torch.ones(2, 3), torch.ones(2, 3), [0.5, 1]),
            r"`clip_ids` has to hold integers or strings but got 0\.5",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)),
            "`clip_ids` has to be a vector of integers .*float32",
        ),
        (
            (torch.ones(2, 3), torch.ones(2, 3), [0, 1], [0]),
            r"`caption_ids` has to be of shape \(2,\), one for each row",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    metric = AudioTextRetrieval()
    with pytest.raises(ValueError, match=f"Argument {message}"):
        metric.update(*arguments)
    assert metric.audio == []
    assert metric.caption_ids == []


@pytest.mark.parametrize("with_ids_first", [True, False])
def test_caption_ids_in_some_updates_only(with_ids_first):
    metric, batch = AudioTextRetrieval(), (torch.ones(1, 2), torch.ones(1, 2), [0])
    metric.update(*batch, caption_ids=[0] if with_ids_first else None)
    with pytest.raises(
        ValueError, match=r"`caption_ids` has to be given in every update or in none, .* Call `reset`"
    ):
        metric.update(*batch, caption_ids=None if with_ids_first else [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": []}, "`top_k` has to name at least one cut-off"),
        ({"top_k": [1, 0]}, "`top_k` has to be an integer of at least 1, but got 0"),
        ({"map_k": 2.5}, r"`map_k` has to be an integer of at least 1, but got 2\.5"),
        ({"block_size": -1}, "`block_size` has to be an integer of at least 1, but got -1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        AudioTextRetrieval(**options)


class Retrieval(L.LightningModule):
    """Logs what the metric computes; the embeddings of epoch e are those of seed e."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.val_metrics = AudioTextRetrieval()
        self.train_metrics = AudioTextRetrieval()
        self.history = []

    def pairs(self, batch):
        return [rows[batch[0]] for rows in noisy_pairs(seed=self.current_epoch)]

    def training_step(self, batch, batch_idx):
        scores = self.train_metrics(*self.pairs(batch))
        self.log_dict({f"train/{name}_step": score for name, score in scores.items()})
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.val_metrics.update(*self.pairs(batch))

    def log_epoch(self, metric, stage):
        self.log_dict({f"{stage}/{name}": score for name, score in metric.compute().items()})
        metric.reset()

    def on_validation_epoch_end(self):
        self.log_epoch(self.val_metrics, "val")

    def on_train_epoch_end(self):
        self.log_epoch(self.train_metrics, "train")
        self.history.append({k: v for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_logs_each_epoch_on_its_own(tmp_path, count_rankings):
    model, rows = Retrieval(), DataLoader(TensorDataset(torch.arange(90)), batch_size=32)
    best = ModelCheckpoint(tmp_path, "best", monitor="val/t2a/recall_at_10", mode="max")
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[best],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, rows, rows)
    expected = [direct(noisy_pairs(seed=epoch)) for epoch in range(2)]
    assert model.history == [{f"val/{name}": score for name, score in one.items()} for one in expected]
    assert best.best_model_score == max(one["t2a/recall_at_10"] for one in expected)
    last_batch = [rows[64:] for rows in noisy_pairs(seed=1)]
    assert trainer.callback_metrics["train/t2a/map_at_10_step"] == direct(last_batch)["t2a/map_at_10"]
    assert trainer.callback_metrics["train/t2a/map_at_10"] == expected[1]["t2a/map_at_10"]
    # Sanity check, two epochs of each, and two times three training batches by `forward`.
    assert len(count_rankings) == 1 + 2 * 2 + 2 * 3
    assert not [name for name in model.state_dict() if "metrics" in name]


def test_with_a_bank_both_searches_are_reported():
    pairs, bank = hubby_pairs(seed=1, hub=3), QueryBank.from_pairs(*hubby_pairs(100, seed=2, hub=3))
    metric = update_in_batches(AudioTextRetrieval(), pairs)
    raw = metric.compute()
    assert raw == direct(pairs)
    for calibration in (CALIBRATIONS[1], CALIBRATIONS[-1]):
        metric.calibrate(bank, calibration)
        scores = metric.compute()
        assert tuple(scores) == metric.score_names
        expected = retrieval_scores(calibrated_ranks(*pairs, bank, [calibration])[0])
        assert scores == raw | {f"calibrated/{name}": score for name, score in expected.items()}
    metric.calibrate(None)
    assert metric.compute() == raw
    assert tuple(raw) == metric.score_names


def test_a_bank_survives_resets_and_copies():
    pairs, bank = hubby_pairs(seed=1, hub=3), QueryBank.from_pairs(*hubby_pairs(100, seed=2, hub=3))
    metric = AudioTextRetrieval()
    metric.calibrate(bank)
    expected = update_in_batches(metric, pairs).compute()
    assert any(name.startswith("calibrated/") for name in expected)
    metric.reset()
    for other in (metric, metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert update_in_batches(other, pairs).compute() == expected
    assert not metric.state_dict()


def test_a_calibration_is_chosen_on_the_rows_of_the_metric():
    pairs, bank = hubby_pairs(seed=3, hub=3), QueryBank.from_pairs(*hubby_pairs(100, seed=2, hub=3))
    metric = update_in_batches(AudioTextRetrieval(), pairs)
    assert metric.choose_calibration(bank) == choose_calibration(*pairs, bank)
    one = metric.choose_calibration(bank, CALIBRATIONS[-1:])
    assert replace(one, gate_top_k=None) == CALIBRATIONS[-1]
    assert metric.compute() == direct(pairs)
    with pytest.raises(ValueError, match="There are no rows to rank"):
        AudioTextRetrieval().choose_calibration(bank)
