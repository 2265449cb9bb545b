"""A test with `SearchCalibration` reports both searches: right, on several ranks, and without traces."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ask_lightning.callbacks import SearchCalibration
from ask_lightning.interaction import LateInteraction, TokenEmbeddings
from ask_lightning.metrics import AudioTextRetrieval, QueryBank, calibrated_ranks, choose_calibration
from ask_lightning.metrics import retrieval_scores as scores_of
from tests.helpers.hubs import hubby_pairs
from tests.helpers.ranks import on_ranks

SPLITS = {"train": (100, 3, 2), "val": (40, 3, 3), "test": (41, 3, 5)}


def pairs(split):
    num_clips, captions, seed = SPLITS[split]
    return hubby_pairs(num_clips, captions, seed=seed, hub=3)


class Pairs(Dataset):
    """Pairs that are embeddings already."""

    def __init__(self, split):
        self.sides = pairs(split)

    def __len__(self):
        return len(self.sides[0])

    def __getitem__(self, number):
        audio, text, clip_ids = self.sides
        return {"audio": audio[number], "text": text[number], "clip_id": clip_ids[number], "row": number}


class Lookup(L.LightningModule):
    """A model that returns what it is given, and counts what it was given."""

    def __init__(self, metric=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.encoded = 0
        if metric:
            self.metric = AudioTextRetrieval()

    def encode_audio(self, batch):
        self.encoded += len(batch["audio"])
        return self.weight * batch["audio"]

    def encode_text(self, batch):
        return self.weight * batch["text"]

    def test_step(self, batch, batch_idx):
        self.metric.update(self.encode_audio(batch), self.encode_text(batch), batch["clip_id"], batch["row"])

    def on_test_epoch_end(self):
        self.log_dict(self.metric.compute(), sync_dist=True)
        self.metric.reset()


class Data(L.LightningDataModule):
    def ordered_dataloader(self, split):
        return DataLoader(Pairs(split), batch_size=16)

    def test_dataloader(self):
        return self.ordered_dataloader("test")


def run_test(devices=1, callbacks=(), model=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (metrics,) = trainer.test(model or Lookup(), verbose=False, **(options or {"datamodule": Data()}))
    return metrics


def expected_scores():
    bank = QueryBank.from_pairs(*pairs("train"))
    chosen = choose_calibration(*pairs("val"), bank)
    return chosen, scores_of(calibrated_ranks(*pairs("test"), bank, [chosen])[0])


def test_both_searches_are_reported():
    callback = SearchCalibration()
    raw, metrics = run_test(), run_test(callbacks=[callback])
    chosen, expected = expected_scores()
    assert callback.calibration == chosen
    assert metrics == raw | {
        f"calibrated/{name}": pytest.approx(float(value)) for name, value in expected.items()
    }
    assert metrics["calibrated/t2a/recall_at_10"] > raw["t2a/recall_at_10"]


def both_on_two_ranks():
    return run_test(2, [SearchCalibration()])


@pytest.mark.filterwarnings("ignore:.*recommended to use .*devices=1")
def test_two_ranks_equal_one():
    expected = run_test(callbacks=[SearchCalibration()])
    for metrics in on_ranks(2, both_on_two_ranks, grouped=False):
        assert metrics == expected


def test_sources_may_be_given():
    loader = DataLoader(Pairs("test"), batch_size=16)
    shuffled = DataLoader(Pairs("train"), batch_size=32, shuffle=True)
    given = SearchCalibration(shuffled, lambda: DataLoader(Pairs("val"), batch_size=7))
    metrics = run_test(callbacks=[given], dataloaders=loader)
    assert metrics == run_test(callbacks=[SearchCalibration()])
    datasets = SearchCalibration(Pairs("train"), Pairs("val"))
    for loaders in (loader, [loader]):
        assert run_test(callbacks=[datasets], dataloaders=loaders) == metrics
    with pytest.raises(ValueError, match=r"no data module .* Pass SearchCalibration\(training=dataset\)"):
        run_test(callbacks=[SearchCalibration()], dataloaders=loader)


def test_the_test_split_chooses_nothing_and_nothing_stays_behind(monkeypatch):
    """Neither the choice nor the bank depends on the test pairs; afterwards the metric is as it was."""
    model, callback = Lookup(), SearchCalibration()
    run_test(callbacks=[callback], model=model)
    assert model.encoded == 300 + 120 + 123
    chosen = callback.calibration
    assert run_test(model=model).keys() == run_test().keys()
    monkeypatch.setitem(SPLITS, "test", (13, 2, 9))
    run_test(callbacks=[callback], model=model)
    assert callback.calibration == chosen


def test_after_an_error_the_metric_is_as_it_was(monkeypatch):
    model = Lookup()

    def broken(*_):
        raise RuntimeError("broken step")

    monkeypatch.setattr(model, "test_step", broken)
    with pytest.raises(RuntimeError, match="broken step"):
        run_test(callbacks=[SearchCalibration()], model=model)
    assert not [name for name in model.metric.score_names if name.startswith("calibrated/")]


def test_the_last_test_alone_says_what_was_used():
    """An attribute that stays would be written down as the calibration of a test that had none."""
    callback = SearchCalibration()
    run_test(callbacks=[callback])
    with pytest.raises(RuntimeError, match="has none"):
        run_test(callbacks=[callback], model=Lookup(metric=False))
    assert callback.calibration is None
    assert callback.bank is None


def test_ids_of_another_name_are_asked_for():
    told = r"`ids` of SearchCalibration has to be a key .* got 'key' and the batch is \['audio', 'clip_id', "
    with pytest.raises(ValueError, match=told):
        run_test(callbacks=[SearchCalibration(ids="key")])


def test_ids_of_a_nested_batch_are_those_of_a_function():
    class Nested(DataLoader):
        """Batches whose ids are not at the top."""

        def __iter__(self):
            for batch in super().__iter__():
                yield batch | {"clip_id": "none", "meta": {"clip": batch["clip_id"]}}

    def ids(module, batch):
        assert isinstance(module, Lookup)
        return batch["meta"]["clip"]

    sources = [Nested(Pairs(split), batch_size=16) for split in ("train", "val")]
    given = SearchCalibration(*sources, ids=ids)
    metrics = run_test(callbacks=[given], dataloaders=DataLoader(Pairs("test"), batch_size=16))
    assert metrics == run_test(callbacks=[SearchCalibration()])


def test_a_module_without_the_metric_is_refused():
    with pytest.raises(RuntimeError, match=r"needs a module with an AudioTextRetrieval, but Lookup has none"):
        run_test(callbacks=[SearchCalibration()], model=Lookup(metric=False))


def test_a_model_of_tokens_is_tested_without_calibration():
    class TokenLookup(Lookup):
        def __init__(self):
            super().__init__(metric=False)
            self.metric = AudioTextRetrieval(interaction=LateInteraction())

        def encode_audio(self, batch):
            audio = super().encode_audio(batch)
            return TokenEmbeddings(audio, audio[:, None])

        def encode_text(self, batch):
            text = super().encode_text(batch)
            return TokenEmbeddings(text, text[:, None])

    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[SearchCalibration(Pairs("train"), Pairs("val"))]
    )
    (found,) = trainer.test(TokenLookup(), DataLoader(Pairs("test"), batch_size=16), verbose=False)
    assert "t2a/recall_at_1" in found
    assert not any("calibrated" in name for name in found)
