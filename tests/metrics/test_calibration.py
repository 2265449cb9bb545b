"""Calibrated search against numpy; chosen on validation, and each query for itself."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ask_lightning import KnowledgeBase
from ask_lightning.metrics import (
    CALIBRATIONS,
    Calibration,
    HubCalibration,
    QueryBank,
    calibrated_ranks,
    choose_calibration,
    retrieval_ranks,
    retrieval_scores,
)
from ask_lightning.metrics import calibration as calibration_module
from ask_lightning.metrics.table import RECALLS, mean_recall
from tests.helpers.hubs import hubby_pairs

GATED = Calibration("nearest_neighbors", num_neighbors=5, gate_top_k=1)


def small_bank() -> QueryBank:
    """A bank that hits some items of a gallery and leaves others alone."""
    return QueryBank.from_pairs(*hubby_pairs(9, 2, seed=2, hub=1))


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=str)
def test_ranks_are_those_of_calibrated_scores(calibration):
    audio, text, clip_ids = hubby_pairs(seed=1, hub=1, noise=1.0)
    bank = small_bank()
    (ranks,) = calibrated_ranks(audio, text, clip_ids, bank, [calibration], block_size=33)
    clips, captions = np.asarray(audio[::3], np.float64), np.asarray(text, np.float64)

    def calibrate(scores, gallery, queries):
        of_bank = queries @ gallery.T
        if calibration.kind == "inverted_softmax":
            temperature = calibration.temperature
            bias = temperature * np.log(np.exp(of_bank / temperature).mean(axis=0))
        else:
            nearest = np.sort(of_bank, axis=0)[::-1][: calibration.num_neighbors]
            bias = calibration.weight * nearest.mean(axis=0)
        hubs = set(of_bank.argmax(axis=1)) if calibration.gate_top_k else set(range(len(gallery)))
        gated = np.isin(scores.argmax(axis=1), list(hubs))
        assert calibration.gate_top_k is None or 0 < gated.sum() < len(gated)
        return np.where(gated[:, None], scores - bias, scores)

    own = np.asarray(clip_ids)
    to_audio = calibrate(captions @ clips.T, clips, np.asarray(bank.text, np.float64))
    to_text = calibrate(clips @ captions.T, captions, np.asarray(bank.audio, np.float64))
    expected = [(row > row[clip]).sum() + 1 for row, clip in zip(to_audio, own, strict=True)]
    assert ranks.text_to_audio.tolist() == expected
    for clip, row in enumerate(to_text):
        places = np.argsort(np.argsort(-row))[own == clip] + 1
        assert sorted(ranks.audio_to_text[own == clip].tolist()) == sorted(places)


@pytest.mark.parametrize("calibration", [CALIBRATIONS[1], CALIBRATIONS[5], GATED], ids=str)
def test_no_query_reads_another(calibration):
    """Further captions of the clips change no rank of the captions that were there."""
    audio, text, clip_ids = hubby_pairs(seed=1, hub=1)
    first = torch.arange(len(text)) % 3 == 0
    ranks = [
        calibrated_ranks(audio[rows], text[rows], clip_ids[rows], small_bank(), [calibration])[0]
        for rows in (first, torch.ones_like(first))
    ]
    assert torch.equal(ranks[0].text_to_audio, ranks[1].text_to_audio[first])
    hubs = HubCalibration.from_bank(small_bank(), audio[::3], text, calibration)
    for candidates, scores in (("audio", text @ audio[::3].T), ("text", audio[::3] @ text.T)):
        together = hubs.calibrate(scores, candidates)
        for row, one in zip(scores, together, strict=True):
            assert torch.equal(hubs.calibrate(row[None], candidates)[0], one)


@pytest.mark.parametrize("calibration", [CALIBRATIONS[1], CALIBRATIONS[5], GATED], ids=str)
def test_the_order_of_the_bank_and_its_copies_change_no_rank(calibration):
    pairs, bank = hubby_pairs(seed=1, hub=1), small_bank()
    generator = torch.Generator().manual_seed(0)
    shuffled = QueryBank(
        *(rows[torch.randperm(len(rows), generator=generator)] for rows in (bank.audio, bank.text))
    )
    ranks, others = (calibrated_ranks(*pairs, each, [calibration])[0] for each in (bank, shuffled))
    assert torch.equal(ranks.text_to_audio, others.text_to_audio)
    assert torch.equal(ranks.audio_to_text, others.audio_to_text)


def test_a_bank_that_is_near_to_nothing_changes_no_rank():
    audio, text, clip_ids = hubby_pairs(seed=1, hub=1)
    audio[:, 15], text[:, 15] = 0, 0
    bank = QueryBank(*(torch.eye(16)[15:].expand(5, 16) for _ in range(2)))
    for ranks in calibrated_ranks(audio, text, clip_ids, bank, CALIBRATIONS):
        raw = retrieval_ranks(audio, text, clip_ids)
        assert torch.equal(ranks.text_to_audio, raw.text_to_audio)
        assert torch.equal(ranks.audio_to_text, raw.audio_to_text)


def test_the_gate_is_kept_where_it_is_better(monkeypatch):
    def ranks(audio, text, clip_ids, bank, calibrations, **_):
        return [1.0 if one == best else 0.5 for one in calibrations]

    monkeypatch.setattr(calibration_module, "calibrated_ranks", ranks)
    monkeypatch.setattr(calibration_module, "retrieval_scores", lambda rank: dict.fromkeys(RECALLS, rank))
    pairs = hubby_pairs(seed=3, hub=3)
    best = CALIBRATIONS[4]
    assert choose_calibration(*pairs, None) is best
    best = replace(CALIBRATIONS[0], gate_top_k=1)  # all are level, so that the first gets the gate
    assert choose_calibration(*pairs, None) == best


def test_calibration_undoes_hubs():
    pairs, bank = hubby_pairs(seed=1, hub=3), QueryBank.from_pairs(*hubby_pairs(100, seed=2, hub=3))
    chosen = choose_calibration(*hubby_pairs(seed=3, hub=3), bank)
    (ranks,) = calibrated_ranks(*pairs, bank, [chosen])
    raw, calibrated = (mean_recall(retrieval_scores(each)) for each in (retrieval_ranks(*pairs), ranks))
    assert calibrated > raw + 0.02


def test_the_first_of_the_best_is_chosen():
    pairs, bank = hubby_pairs(seed=3, hub=3), QueryBank.from_pairs(*hubby_pairs(100, seed=4, hub=3))
    recalls = [mean_recall(retrieval_scores(ranks)) for ranks in calibrated_ranks(*pairs, bank, CALIBRATIONS)]
    assert len(set(recalls)) > 3
    expected = CALIBRATIONS[recalls.index(max(recalls))]
    gated = replace(expected, gate_top_k=1)
    (ranks,) = calibrated_ranks(*pairs, bank, [gated])
    if mean_recall(retrieval_scores(ranks)) > max(recalls):
        expected = gated
    assert choose_calibration(*pairs, bank) == expected
    assert choose_calibration(*pairs, bank, [CALIBRATIONS[0]]) != choose_calibration(*pairs, bank)
    with pytest.raises(ValueError, match="`calibrations` has to hold at least one"):
        choose_calibration(*pairs, bank, [])


def test_a_clip_of_several_pairs_is_one_query_of_the_bank():
    audio, text, clip_ids = hubby_pairs(60, 2, seed=2)
    unequal = torch.cat([torch.arange(120), torch.arange(20)])  # further rows of ten clips
    bank = QueryBank.from_pairs(audio, text, clip_ids)
    again = QueryBank.from_pairs(audio[unequal], text[unequal], clip_ids[unequal])
    torch.testing.assert_close(bank.audio, audio[::2])
    torch.testing.assert_close(again.audio, bank.audio)
    assert (len(bank.text), len(again.text)) == (120, 140)


def test_ids_of_a_bank_may_be_names():
    audio, text = torch.eye(3), torch.eye(3)
    named = QueryBank.from_pairs(audio, text, ["dog.wav", "rain.wav", "rain.wav"])
    assert named.audio.shape == (2, 3)
    assert torch.equal(QueryBank.from_pairs(audio, text, [5, 6, 6]).audio, named.audio)


def test_the_pairs_of_a_knowledge_base_are_a_bank():
    audio, text, clip_ids = hubby_pairs(20, 2)
    base = KnowledgeBase.from_embeddings(3 * audio, text, ids=clip_ids, num_prototypes=4, storage="bfloat16")
    bank = QueryBank.from_knowledge(base)
    torch.testing.assert_close(bank.text, normalize(text.bfloat16().float()))
    torch.testing.assert_close(bank.audio, audio[::2], atol=5e-3, rtol=0)
    assert bank.audio.dtype == torch.float32


def test_all_calibrations_of_a_gallery_are_each_for_itself():
    audio, text, _ = hubby_pairs()
    many = HubCalibration.from_bank_by_each(small_bank(), audio, text, CALIBRATIONS)
    for calibration, found in zip(CALIBRATIONS, many, strict=True):
        alone = HubCalibration.from_bank(small_bank(), audio, text, calibration)
        assert found.calibration == calibration
        assert ("audio_hubs" in found.tensors) == (calibration.gate_top_k is not None)
        assert found.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(found.tensors[name], alone.tensors[name]) for name in alone.tensors)


def test_copies_share_the_bank():
    bank = small_bank()
    assert copy.deepcopy(bank) is bank


@pytest.mark.parametrize(
    ("audio", "text"),
    [
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(0, 3), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.ones(2, 3).long()),
        (torch.ones(2, 3), torch.full((2, 3), float("nan"))),
        (torch.ones(3), torch.ones(2, 3)),
    ],
)
def test_banks_that_there_are_not(audio, text):
    with pytest.raises(ValueError, match=r"of a bank has to be a finite floating tensor of shape"):
        QueryBank(audio, text)


def test_a_bank_of_another_width_is_refused():
    bank = QueryBank(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"shape \(queries, 16\) .* but got \(2, 5\)"):
        calibrated_ranks(*hubby_pairs(), bank, [Calibration()])
    hubs = HubCalibration.from_bank(small_bank(), *hubby_pairs()[:2])
    with pytest.raises(ValueError, match="Argument `candidates` has to be one of"):
        hubs.calibrate(torch.ones(1, 120), "clips")
