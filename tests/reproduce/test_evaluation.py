"""Metrics of a run: the calibration is chosen on validation, the bank is the training part."""

from dataclasses import replace

from ask_lightning.metrics import CALIBRATIONS, QueryBank, choose_calibration
from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.evaluation import RECALLS, Embeddings, evaluate
from tests.helpers.hubs import hubby_pairs


def embeddings(*arguments, **options):
    return Embeddings(*hubby_pairs(*arguments, **options))


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
    assert results[0].calibration == choose_calibration(*validation.pairs, QueryBank.from_pairs(*bank.pairs))
    assert results[0].validation_calibrated == results[1].validation_calibrated
    assert results[0].test_calibrated != results[1].test_calibrated
