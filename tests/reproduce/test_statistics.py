"""Paired differences: scipy's paired t-test, a case by hand, and what has no spread."""

import math
import random

import pytest
from scipy import stats

from ask_lightning.reproduce import paired_difference


@pytest.mark.parametrize("count", [2, 5, 12])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_agrees_with_scipy(count, confidence):
    generator = random.Random(count)
    values, reference = ([generator.gauss(mean, 1) for _ in range(count)] for mean in (30.5, 30))
    difference = paired_difference(values, reference, confidence=confidence)
    test = stats.ttest_rel(values, reference)
    interval = test.confidence_interval(confidence)
    assert difference.mean == pytest.approx(
        sum(a - b for a, b in zip(values, reference, strict=True)) / count
    )
    assert difference.p == pytest.approx(test.pvalue)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, error 1/√3; t₀.₉₇₅ with two degrees of freedom is 4.3027.
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert difference.mean == 2
    assert difference.high - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    # The tail of t with two degrees of freedom: p = 1 - t / √(2 + t²), with t = 2√3.
    assert difference.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_one_pair_has_no_interval():
    difference = paired_difference([2.0], [1.5])
    assert difference.mean == 0.5
    assert all(map(math.isnan, difference[1:]))


@pytest.mark.parametrize(("values", "p"), [([1.0, 2.0], 1.0), ([1.5, 2.5], 0.0)])
def test_equal_differences(values, p):
    mean = values[0] - 1
    assert paired_difference(values, [1.0, 2.0]) == (mean, mean, mean, p)


@pytest.mark.parametrize(("values", "reference"), [([], []), ([1.0], [1.0, 2.0])])
def test_values_that_are_no_pairs(values, reference):
    with pytest.raises(ValueError, match=f"equally many .* but got {len(values)} and {len(reference)}"):
        paired_difference(values, reference)
