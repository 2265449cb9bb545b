"""Ids of clips: integers of every kind, strings that hash the same everywhere."""

import numpy as np
import pytest
import torch

from ask_lightning.utilities.clip_ids import integer_ids


class TestIdentifiers:
    @pytest.mark.parametrize(
        "ids",
        [
            [3, 1, 3],
            (3, 1, 3),
            torch.tensor([3, 1, 3]),
            torch.tensor([3, 1, 3], dtype=torch.int32),
            np.array([3, 1, 3]),
            [np.int64(3), np.int32(1), np.uint8(3)],
            list(torch.tensor([3, 1, 3])),
        ],
    )
    def test_integers_of_every_kind_are_themselves(self, ids):
        assert torch.equal(integer_ids(ids), torch.tensor([3, 1, 3]))

    @pytest.mark.parametrize("ids", [["a", "ü", "a"], ("a", "ü", "a"), np.array(["a", "ü", "a"])])
    def test_strings_are_the_same_in_every_run(self, ids):
        """Snapshots hold these numbers: another hash would make strangers of the ids in older ones."""
        expected = [4681665781835383343, 6192904641445441335]
        assert integer_ids(ids).tolist() == [expected[0], expected[1], expected[0]]

    def test_different_strings_differ(self):
        assert len(integer_ids([f"clip {i}" for i in range(20_000)]).unique()) == 20_000
        assert len(integer_ids(["1", "01", "1.0", " 1", ""]).unique()) == 5

    @pytest.mark.parametrize("item", [b"a", 1.0, None, [1]], ids=repr)
    def test_what_is_no_id_says_how_to_make_one(self, item):
        with pytest.raises(ValueError, match=r"integers or strings but got .*Pass `str\(id\)`"):
            integer_ids([item])

    @pytest.mark.parametrize("ids", [{1, 2}, {"a": 1}, "ab", b"ab"], ids=repr)
    def test_what_has_no_rows(self, ids):
        with pytest.raises(ValueError, match=r"`ids` has to be a sequence of ids"):
            integer_ids(ids)

    def test_names_of_files_that_are_no_unicode(self):
        one, other = (name.decode(errors="surrogateescape") for name in (b"a\xff.wav", b"a\xfe.wav"))
        assert len(integer_ids([one, other, one]).unique()) == 2

    def test_extremes(self):
        assert integer_ids([2**63 - 1, -(2**63)]).tolist() == [2**63 - 1, -(2**63)]
        assert integer_ids([]).dtype == torch.int64
        assert integer_ids([True, False]).tolist() == [1, 0]

    @pytest.mark.parametrize(
        "ids",
        [
            [2**63],
            [-(2**63) - 1],
            np.array([2**63], dtype=np.uint64),
            torch.tensor([2**63], dtype=torch.uint64),
        ],
    )
    def test_integers_that_do_not_fit(self, ids):
        with pytest.raises(ValueError, match=r"`clips` has to hold integers of 64 bits but got -?9"):
            integer_ids(ids, name="clips")

    def test_unsigned_integers_that_fit(self):
        ids = torch.tensor([3, 2**63 - 1]).to(torch.uint64)
        assert integer_ids(ids).tolist() == [3, 2**63 - 1]


def test_string_and_integer_ids_do_not_meet_by_chance():
    strings = integer_ids([str(number) for number in range(1000)])
    assert not bool(torch.isin(strings, torch.arange(1000)).any())
