"""Calibrated metrics: right by brute force, chosen on validation, by training queries alone."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.evaluation import (
    CALIBRATIONS,
    RECALLS,
    Embeddings,
    evaluate,
    retrieval_metrics,
)


def embeddings(num_clips=40, captions=3, *, seed=0, hub=0.0, noise=0.4):
    """Pairs; with `hub`, all captions lean towards the first axis, and some clips do."""
    generator = torch.Generator().manual_seed(seed)
    clip_ids = torch.arange(num_clips).repeat_interleave(captions)
    clips = torch.randn(num_clips, 16, generator=generator)
    text = clips[clip_ids] + noise * torch.randn(len(clip_ids), 16, generator=generator)
    text[:, 0] += hub
    clips[:: num_clips // 10, 0] += hub
    return Embeddings(normalize(clips)[clip_ids], normalize(text), clip_ids)


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=str)
def test_calibrated_recalls_are_those_of_biased_scores(calibration):
    part, bank = embeddings(seed=1, hub=2, noise=1.0), embeddings(60, 2, seed=2, hub=2, noise=1.0)
    metrics = retrieval_metrics(part, bank, calibration)
    clips, captions = np.asarray(part.audio[::3], np.float64), np.asarray(part.text, np.float64)
    bank_clips, bank_captions = np.asarray(bank.audio[::2], np.float64), np.asarray(bank.text, np.float64)

    def bias(gallery, queries):
        scores = gallery @ queries.T
        if calibration["calibration"] == "inverted_softmax":
            temperature = calibration["temperature"]
            return temperature * np.log(np.exp(scores / temperature).mean(axis=1))
        nearest = np.sort(scores, axis=1)[:, ::-1][:, : calibration["num_neighbors"]]
        return calibration["weight"] * nearest.mean(axis=1)

    own = np.asarray(part.clip_ids)
    to_audio = captions @ clips.T - bias(clips, bank_captions)
    to_text = clips @ captions.T - bias(captions, bank_clips)
    found = [(row > row[clip]).sum() + 1 for row, clip in zip(to_audio, own, strict=True)]
    for k in (1, 5, 10):
        assert metrics[f"t2a/recall_at_{k}"] == pytest.approx(np.mean(np.array(found) <= k))
        hits = [own[np.argsort(-row)[:k]] == clip for clip, row in enumerate(to_text)]
        assert metrics[f"a2t/recall_at_{k}"] == pytest.approx(np.mean([hit.any() for hit in hits]))


def test_calibration_undoes_hubs():
    validation, test, bank = (embeddings(num, seed=seed, hub=3) for seed, num in enumerate((40, 40, 100)))
    metrics = evaluate(validation, test, bank)
    assert mean_recall(metrics.test_calibrated) > mean_recall(metrics.test) + 0.02
    assert set(metrics.test) == set(metrics.validation_calibrated) == set(RECALLS)


def test_the_calibration_is_the_best_on_validation_whatever_the_test_part_is():
    validation, bank = embeddings(seed=3, hub=3), embeddings(100, seed=4, hub=3)
    results = [evaluate(validation, embeddings(seed=seed), bank) for seed in (5, 6)]
    assert results[0].calibration == results[1].calibration
    assert results[0].validation_calibrated == results[1].validation_calibrated
    tried = [mean_recall(retrieval_metrics(validation, bank, calibration)) for calibration in CALIBRATIONS]
    assert mean_recall(results[0].validation_calibrated) == max(tried)
    assert results[0].calibration == CALIBRATIONS[tried.index(max(tried))]


def test_a_clip_of_several_pairs_is_one_query_of_the_bank():
    part, bank = embeddings(seed=1), embeddings(60, 2, seed=2)
    unequal = torch.cat([torch.arange(120), torch.arange(20)])  # further rows of ten clips
    again = Embeddings(bank.audio[unequal], bank.text[unequal], bank.clip_ids[unequal])
    assert torch.allclose(bank.clips()[0], again.clips()[0])
    assert torch.equal(bank.clips()[1], bank.clip_ids)
    metrics = [retrieval_metrics(part, source, CALIBRATIONS[1]) for source in (bank, again)]
    assert all(metrics[0][name] == metrics[1][name] for name in RECALLS[:3])
