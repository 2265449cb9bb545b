"""`checksum`: equal for equal bits only, and the sum of its parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.row_shard import Part
from ask_lightning.utilities.distributed import Ranks
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


@PROPERTY
@given(items=st.integers(1, 30), size=st.integers(1, 5), at_a_time=st.integers(1, 3), in_turn=st.booleans())
def test_parts_add_up_and_find_their_rows(items, size, at_a_time, in_turn):
    """Every way to deal out rows covers each of them once, and knows where it is."""
    total = items * at_a_time
    tensor = directions(total, 4)
    cuts = sorted(torch.randint(total + 1, (size - 1,), generator=generator(items)).tolist())
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
    parts = [
        Part.dealt(items, Ranks(rank, size), at_a_time)
        if in_turn
        else Part.brought(counts, Ranks(rank, size))
        for rank in range(size)
    ]
    assert sorted(torch.cat([part.rows() for part in parts]).tolist()) == list(range(total))
    assert sum(checksum(tensor[part.rows()], part.rows()) for part in parts) % 2**64 == checksum(tensor)
    for rank, part in enumerate(parts):
        assert part.total == total
        owner, local = parts[0].locate(part.rows())
        assert owner.tolist() == [rank] * part.counts[rank]
        assert local.tolist() == list(range(part.counts[rank]))
        assert torch.equal(part.own(tensor), tensor[part.rows()])


@pytest.mark.parametrize("shape", [(0, 4), (0,), (5,), (), (3, 2, 2)])
def test_any_shape(shape):
    assert 0 <= checksum(torch.ones(shape)) < 2**64
