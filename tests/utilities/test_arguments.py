"""The checks of arguments name the argument, the value and what is allowed."""

import math
import re

import pytest

from ask_lightning.utilities.arguments import check_choice, check_count, check_positive, check_range


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "4", None])
def test_count(value):
    message = re.escape(f"Argument `k` has to be an integer of at least 1, but got {value!r}.")
    with pytest.raises(ValueError, match=message):
        check_count("k", value)
    check_count("k", 1)
    check_count("k", 0, least=0)


def test_choice():
    with pytest.raises(ValueError, match=r"Argument `how` has to be one of \('a', 'b'\), but got 'c'\."):
        check_choice("how", "c", ("a", "b"))
    check_choice("how", "b", ("a", "b"))


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_range(value):
    with pytest.raises(ValueError, match=rf"Argument `share` has to be in \[0, 1\], but got {value}\."):
        check_range("share", value, 0, 1)
    for allowed in (0, 0.5, 1):
        check_range("share", allowed, 0, 1)


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_positive(value):
    with pytest.raises(ValueError, match=rf"Argument `epsilon` has to be positive, but got {value}\."):
        check_positive("epsilon", value)
    check_positive("epsilon", 1e-9)
