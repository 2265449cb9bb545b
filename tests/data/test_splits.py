"""Splits that share no clip, and are the same on every machine."""

import pytest

from ask_lightning.data import split_by_clip


def test_split_keeps_clips_together_and_covers_everything():
    clip_ids = [index // 3 for index in range(300)]
    parts = split_by_clip(clip_ids, (0.8, 0.1, 0.1))
    assert sorted(index for part in parts for index in part) == list(range(300))
    clips = [{clip_ids[index] for index in part} for part in parts]
    assert [len(part) for part in clips] == [80, 10, 10]
    assert not clips[0] & clips[1] | clips[0] & clips[2] | clips[1] & clips[2]


def test_split_depends_on_seed_and_not_on_the_order_of_rows():
    clip_ids = [f"clip {index}" for index in range(50)]
    train, _ = split_by_clip(clip_ids, (0.6, 0.4), seed=1)
    backwards, _ = split_by_clip(clip_ids[::-1], (0.6, 0.4), seed=1)
    assert {clip_ids[index] for index in train} == {clip_ids[::-1][index] for index in backwards}
    assert train != split_by_clip(clip_ids, (0.6, 0.4), seed=2)[0]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.5, 0.4), r"positive numbers with sum 1, but got \(0.5, 0.4\)"),
        ((1.2, -0.2), r"positive numbers with sum 1"),
        ((), r"positive numbers with sum 1"),
        ((0.9, 0.1), r"Part 1 of `fractions` \(0.9, 0.1\) would be empty: there are only 3 clips"),
    ],
)
def test_impossible_splits(fractions, message):
    with pytest.raises(ValueError, match=message):
        split_by_clip([0, 1, 2], fractions)
