"""Metrics, losses and captions against recorded outputs of the public code; README.md says which."""

import json

import pytest
import torch

from ask_lightning.data import plain_caption
from ask_lightning.losses import NTXentLoss, TripletLoss
from ask_lightning.metrics import AudioTextRetrieval
from ask_lightning.models.retriever import embedding_spread
from tests.parity import inputs
from tests.parity.record import RECORDED

PUBLIC = json.loads(RECORDED.read_text(encoding="utf-8"))
ACT, CLAP = PUBLIC["audio-text_retrieval"], PUBLIC["ml-clap"]


@pytest.mark.parametrize("source", [ACT, CLAP])
def test_metrics(source):
    audio, text = inputs.embeddings()
    metric = AudioTextRetrieval(top_k=[1, 5, 10, 50])
    metric.update(audio, text, torch.arange(len(audio)) // 5)
    found = metric.compute()
    for direction in ("t2a", "a2t"):
        r1, r5, r10, r50, median, _, *precision = source[direction]
        expected = {"recall_at_1": r1, "recall_at_5": r5, "recall_at_10": r10, "recall_at_50": r50}
        expected |= dict.fromkeys(["map_at_10"] if precision else [], *precision)
        for name, percent in expected.items():
            assert 100 * found[f"{direction}/{name}"].item() == pytest.approx(percent, abs=1e-4), name
        assert found[f"{direction}/median_rank"].item() == median


def test_losses():
    audio, text = inputs.embeddings()
    assert NTXentLoss(0.07)(audio, text).item() == pytest.approx(ACT["nt_xent"], rel=1e-5)
    regularized = NTXentLoss(0.07)(audio, text) + embedding_spread(audio) + embedding_spread(text)
    assert regularized.item() == pytest.approx(CLAP["loss"], rel=1e-5)
    triplet = TripletLoss(margin=0.2, negatives="hardest")(audio, text).item()
    assert triplet == pytest.approx(ACT["triplet"], rel=1e-5)


def test_captions():
    """The words are the same, and spaces mean nothing to the tokenizers."""
    for sentence, act, clap in zip(inputs.SENTENCES, ACT["captions"], CLAP["captions"], strict=True):
        assert plain_caption(sentence) == " ".join(clap.split())
        if not set(sentence) & set("()|*"):
            assert plain_caption(sentence) == " ".join(act.split())
