"""Paired differences between two methods that ran with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class PairedDifference(NamedTuple):
    """The mean difference of paired values, and how sure it is.

    Attributes:
        mean: Mean of value minus reference over the pairs.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        p: Two-sided p-value of the paired t-test: how probable a difference at least this large is if
            there is none.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_difference(
    values: Sequence[float], reference: Sequence[float], *, confidence: float = 0.95
) -> PairedDifference:
    """Compare paired values by Student's t.

    Pairs share a seed, so that what a seed does to both leaves their difference.

    Args:
        values: Values of a method, one for each seed.
        reference: Values of the method to compare with, for the same seeds in the same order.
        confidence: Confidence of the interval, between 0 and 1.

    Returns:
        The difference. With one pair there is no interval and no test: they are NaN. If all differences
        are equal, the interval is a point, and p is 1 for no difference and 0 for any other.

    Raises:
        ValueError: There are no values, or not equally many.

    Examples:
        >>> difference = paired_difference([3.0, 5.0, 4.0], [2.0, 3.0, 1.0])
        >>> [round(value, 3) for value in difference]
        [2.0, -0.484, 4.484, 0.074]
    """
    if len(values) != len(reference) or not values:
        raise ValueError(
            "Arguments `values` and `reference` have to hold a value for each seed, equally many and at "
            f"least one, but got {len(values)} and {len(reference)}."
        )
    from scipy import stats

    differences = [value - other for value, other in zip(values, reference, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return PairedDifference(mean, math.nan, math.nan, math.nan)
    if min(differences) == max(differences):
        return PairedDifference(mean, mean, mean, float(mean == 0))
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    error = math.sqrt(variance / count)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    return PairedDifference(mean, mean - half, mean + half, p)
