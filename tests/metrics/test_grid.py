"""Vectors on the grid: unit length, exact products, and no trace of the parts that they are made in."""

import torch

from ask_lightning.metrics.grid import unit_clips, unit_rows
from tests.helpers.retrieval_reference import noisy_pairs


def test_rows_have_unit_length_and_parts_change_nothing(monkeypatch):
    rows = 5 * noisy_pairs()[0]
    rows[3] = 0
    whole = unit_rows(rows)
    torch.testing.assert_close(whole, torch.nn.functional.normalize(rows.double()), atol=1e-7, rtol=0)
    monkeypatch.setattr("ask_lightning.metrics.grid._ROWS_PER_PART", 7)
    assert torch.equal(unit_rows(rows), whole)


def test_products_do_not_depend_on_the_order_of_the_sum():
    audio, text = (unit_rows(side) for side in noisy_pairs(width=300)[:2])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(audio @ text.T, audio[:, order] @ text[:, order].T)


def test_a_clip_is_the_mean_direction_of_its_rows():
    audio, _, clip_ids = noisy_pairs(crop_noise=0.5)
    clips, clip_of = unit_clips(audio, clip_ids)
    ids = clip_ids.unique()
    assert torch.equal(ids[clip_of], clip_ids)
    for number, clip in enumerate(ids):
        mean = torch.nn.functional.normalize(audio[clip_ids == clip].double(), dim=1).mean(dim=0)
        torch.testing.assert_close(clips[number], mean / mean.norm(), atol=1e-7, rtol=0)
