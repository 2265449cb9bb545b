"""The examples in the docstrings run as they are printed."""

import doctest

import ask_lightning.distributed


def test_examples():
    failed, attempted = doctest.testmod(ask_lightning.distributed)
    assert failed == 0
    assert attempted >= 2
