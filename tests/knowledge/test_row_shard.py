"""`RowShard`: every row of a table on one rank, and found there."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge.checksum import checksum
from ask_lightning.knowledge.row_shard import RowShard, ShardedRows
from ask_lightning.utilities.distributed import Ranks
from tests.helpers.vectors import directions, generator

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


@PROPERTY
@given(
    num_items=st.integers(1, 30),
    size=st.integers(1, 5),
    rows_per_item=st.integers(1, 3),
    interleaved=st.booleans(),
)
def test_shards_cover_every_row_once_and_locate_it(num_items, size, rows_per_item, interleaved):
    num_rows = num_items * rows_per_item
    table = directions(num_rows, 4)
    cuts = sorted(torch.randint(num_rows + 1, (size - 1,), generator=generator(num_items)).tolist())
    counts = [end - start for start, end in zip([0, *cuts], [*cuts, num_rows], strict=True)]
    shards = [
        RowShard.interleaved(num_items, Ranks(rank, size), rows_per_item)
        if interleaved
        else RowShard.contiguous(counts, Ranks(rank, size))
        for rank in range(size)
    ]
    assert sorted(torch.cat([shard.global_rows() for shard in shards]).tolist()) == list(range(num_rows))
    sums = sum(checksum(table[shard.global_rows()], shard.global_rows()) for shard in shards)
    assert sums % 2**64 == checksum(table)
    for rank, shard in enumerate(shards):
        assert shard.num_rows == num_rows
        owner, local = shards[0].locate(shard.global_rows())
        assert owner.tolist() == [rank] * shard.num_local_rows
        assert local.tolist() == list(range(shard.num_local_rows))
        assert torch.equal(shard.select(table), table[shard.global_rows()])


def test_interleaved_items_stay_together():
    shards = [RowShard.interleaved(3, Ranks(rank, 2), rows_per_item=2) for rank in range(2)]
    assert [shard.global_rows().tolist() for shard in shards] == [[0, 1, 4, 5], [2, 3]]


def test_one_process_holds_all():
    table = directions(7, 3)
    rows = ShardedRows.unsharded(table)
    assert torch.equal(rows.shard.gather(table), table)
    assert torch.equal(rows.shard.select(table), table)
    wanted = torch.tensor([[6, 0], [3, 3]])
    assert torch.equal(rows.fetch(wanted), table[wanted])
