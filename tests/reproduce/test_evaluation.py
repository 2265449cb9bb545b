"""Metrics of a run: the calibration is chosen on validation, the bank is the training part."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ask_lightning.interaction import LateInteraction, TokenEmbeddings
from ask_lightning.metrics import CALIBRATIONS, AudioTextRetrieval, QueryBank, choose_calibration
from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.evaluation import (
    RECALLS,
    EmbeddedPart,
    embed_loader,
    evaluate,
    evaluate_uncalibrated,
)
from tests.helpers.clients import PlainTowers, make_loader, make_trainer
from tests.helpers.hubs import hubby_pairs


def test_a_process_that_is_asked_to_end_while_it_evaluates_ends():
    class Interrupted(PlainTowers):
        def encode_audio(self, batch):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().encode_audio(batch)

    with pytest.raises(SIGTERMException):
        embed_loader(make_trainer(), Interrupted(), make_loader(16))


def embeddings(*arguments, **options):
    return EmbeddedPart(*hubby_pairs(*arguments, **options))


def test_calibration_undoes_hubs():
    validation, test, bank = (embeddings(num, seed=seed, hub=3) for seed, num in enumerate((40, 40, 100)))
    metrics = evaluate(validation, test, bank)
    assert mean_recall(metrics.test_calibrated) > mean_recall(metrics.test) + 0.02
    assert set(metrics.test) == set(metrics.validation_calibrated) == set(RECALLS)


def test_the_calibration_is_the_best_on_validation_whatever_the_test_part_is():
    validation, bank = embeddings(seed=3, hub=3), embeddings(100, seed=4, hub=3)
    results = [evaluate(validation, embeddings(seed=seed), bank) for seed in (5, 6)]
    assert results[0].calibration == results[1].calibration
    assert replace(results[0].calibration, gate_top_k=None) in CALIBRATIONS
    pairs, training = ((part.audio, part.text, part.clip_ids) for part in (validation, bank))
    assert results[0].calibration == choose_calibration(*pairs, QueryBank.from_pairs(*training))
    assert results[0].validation_calibrated == results[1].validation_calibrated
    assert results[0].test_calibrated != results[1].test_calibrated


def test_an_interaction_ranks_both_parts_and_leaves_calibrated_search_out():
    def part(seed):
        pairs = embeddings(seed=seed, hub=3)
        useless = torch.randn_like(pairs.audio)
        frames = torch.stack([useless, pairs.audio], dim=1)
        mask = torch.tensor([[False, True]]).expand(len(useless), 2)
        return pairs, EmbeddedPart(
            TokenEmbeddings(useless, frames, mask),
            TokenEmbeddings(useless, pairs.text.unsqueeze(1)),
            pairs.clip_ids,
        )

    (plain, tokens), (_, others) = part(1), part(2)
    metrics = evaluate_uncalibrated(tokens, others, LateInteraction())
    metric = AudioTextRetrieval()
    metric.update(plain.audio, plain.text, plain.clip_ids)
    wanted = metric.compute()
    for name in RECALLS:
        if name.startswith("t2a"):
            assert metrics.validation[name] == pytest.approx(float(wanted[name]), abs=1e-6)
    assert metrics.test != metrics.validation
    assert (metrics.validation_calibrated, metrics.test_calibrated, metrics.calibration) == (None,) * 3
