"""`checksum`: equal for equal bits only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge.checksum import checksum
from tests.helpers.vectors import directions, generator

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8]


@PROPERTY
@given(rows=st.integers(1, 40), width=st.integers(1, 9), bit=st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_counts(dtype, rows, width, bit):
    tensor = (100 * torch.randn(rows, width, generator=generator(rows))).to(dtype)
    bytes_ = bytearray(tensor.view(torch.uint8).numpy().tobytes())
    bytes_[bit // 8 % len(bytes_)] ^= 1 << bit % 8
    other = torch.frombuffer(bytes_, dtype=torch.uint8).view(dtype).view(rows, width)
    assert checksum(tensor) != checksum(other)
    assert checksum(tensor) == checksum(tensor.clone())


def test_order_of_rows_and_columns_counts():
    tensor = directions(30, 6)
    assert (
        len({checksum(tensor), checksum(tensor.flip(0)), checksum(tensor.flip(1)), checksum(tensor[:29])})
        == 4
    )


def test_zero_and_minus_zero_differ():
    """As bits do."""
    assert checksum(torch.zeros(2, 2)) != checksum(-torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(0, 4), (0,), (5,), (), (3, 2, 2)])
def test_any_shape(shape):
    assert 0 <= checksum(torch.ones(shape)) < 2**64
