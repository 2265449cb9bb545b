from itertools import pairwise

import pytest

from ask_lightning.utilities.evenly_spaced import evenly_spaced


@pytest.mark.parametrize(("size", "most"), [(1, 1), (1, 5), (7, 7), (50, 49), (2**24 + 3, 1000), (10**10, 3)])
def test_rows_are_distinct_and_reach_from_the_first_to_the_last(size, most):
    rows = evenly_spaced(size, most).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == min(size, most)
    assert rows[0] == 0
    assert rows[-1] == (size - 1 if most > 1 else 0)
    gaps = {after - before for before, after in pairwise(rows)}
    assert not gaps or max(gaps) - min(gaps) <= 1
