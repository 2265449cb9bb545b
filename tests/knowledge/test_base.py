"""Making a `KnowledgeBase`, and what it is: immutable, comparable, portable."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase, StoredPairs
from ask_lightning.knowledge.exact_search import ExactSearch, FastestExactSearch
from ask_lightning.knowledge.faiss_search import FaissSearch
from ask_lightning.knowledge.prototypes import PAIRINGS, build_prototypes
from tests.helpers import reference
from tests.helpers.vectors import directions, generator, needs_gpu, tensors_in, tensors_of


def raw(rows: int, width: int = 6, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of any length, as encoders give them."""
    audio, text = torch.randn(2, rows, width, generator=generator(seed), dtype=torch.float64)
    return (3 * audio).to(dtype), (0.2 * text).to(dtype)


def make(rows: int = 60, **options) -> KnowledgeBase:
    return KnowledgeBase.from_embeddings(*raw(rows), **{"num_prototypes": 5, **options})


class TestMaking:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_rows_are_the_normalised_embeddings_in_order(self, dtype):
        audio, text = raw(60, dtype=dtype)
        base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=5)
        stored = torch.float64 if dtype == torch.float64 else torch.float32
        tolerance = 1e-15 if dtype == torch.float64 else 2e-7
        for rows, given in ((base.fine.audio, audio), (base.fine.text, text)):
            assert rows.dtype == stored
            expected = reference.unit_length(given.double().numpy())
            np.testing.assert_allclose(rows.double().numpy(), expected, atol=tolerance)
        assert base.coarse.audio.dtype == base.coarse.text.dtype == stored

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("pairing", PAIRINGS)
    def test_prototypes_are_those_of_the_rows(self, pairing, normalize):
        options = {"prototype_pairing": pairing, "normalize_prototypes": normalize, "seed": 3}
        base = make(num_prototypes=7, **options)
        expected = build_prototypes(base.fine, 7, pairing=pairing, normalize=normalize, seed=3)
        assert torch.equal(base.coarse.audio, expected.audio)
        assert torch.equal(base.coarse.text, expected.text)

    def test_defaults_are_the_papers(self):
        base = KnowledgeBase.from_embeddings(*raw(520))
        assert len(base.coarse) == 512
        assert base.fine.index == "auto"
        assert base.ids.tolist() == list(range(520))
        same = KnowledgeBase.from_embeddings(
            *raw(520), prototype_pairing="matched", normalize_prototypes=True, seed=0
        )
        assert base.fingerprint == same.fingerprint

    def test_describes_itself(self):
        base = make(index="exact")
        assert repr(base) == "KnowledgeBase(60 pairs, 5 prototypes, width 6, index='exact', cpu)"
        assert (base.width, base.device, len(base.fine), len(base.coarse)) == (6, torch.device("cpu"), 60, 5)

    def test_carries_no_gradient_and_leaves_the_embeddings_alone(self):
        audio, text = (side.requires_grad_() for side in raw(60))
        copies = audio.detach().clone(), text.detach().clone()
        base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=5)
        for side in (base.fine, base.coarse):
            assert not side.audio.requires_grad
            assert not side.text.requires_grad
        with torch.no_grad():
            assert torch.equal(audio, copies[0])
            assert torch.equal(text, copies[1])
            before = base.fine.audio.clone()
            audio.zero_()
        assert torch.equal(base.fine.audio, before)

    def test_unit_rows_are_kept_bit_for_bit(self):
        audio, text = directions(50, 6, 0), directions(50, 6, 1)
        base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=4)
        assert torch.equal(base.fine.audio, audio)
        again = KnowledgeBase.from_embeddings(base.fine.audio, base.fine.text, num_prototypes=4)
        assert again.fingerprint == base.fingerprint

    def test_global_generator_is_left_alone(self):
        state = torch.get_rng_state()
        make(400, num_prototypes=30)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_seed_decides(self):
        assert make(seed=1).fingerprint == make(seed=1).fingerprint
        assert make(seed=1).fingerprint != make(seed=2).fingerprint

    def test_audio_and_text_alike(self):
        """The same tensor for both, as in a test of one encoder, is not stored as one."""
        audio, _ = raw(30)
        base = KnowledgeBase.from_embeddings(audio, audio, num_prototypes=3)
        assert base.fine.audio.data_ptr() != base.fine.text.data_ptr()


class TestRefused:
    @pytest.mark.parametrize(
        ("audio", "text"),
        [((5, 3), (5, 4)), ((5, 3), (4, 3)), ((5,), (5,)), ((2, 5, 3), (2, 5, 3)), ((), ())],
    )
    def test_shapes(self, audio, text):
        message = rf"same shape \(pairs, width\), but got {re.escape(str(audio))} and {re.escape(str(text))}"
        with pytest.raises(ValueError, match=message):
            KnowledgeBase.from_embeddings(torch.ones(audio), torch.ones(text))

    def test_empty_source(self):
        with pytest.raises(ValueError, match="knowledge source is empty: it yielded no audio–text pair"):
            KnowledgeBase.from_embeddings(torch.empty(0, 4), torch.empty(0, 4))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    @pytest.mark.parametrize("side", ["audio", "text"])
    def test_broken_rows_are_named(self, side, dtype, value):
        embeddings = dict(zip(("audio", "text"), raw(60, dtype=dtype), strict=True))
        embeddings[side][[3, 17], [0, 5]] = value
        message = rf"The {side} embeddings of 2 of 60 source rows contain NaN or Inf \(rows 3, 17\)\. Check"
        with pytest.raises(ValueError, match=message):
            KnowledgeBase.from_embeddings(**embeddings)

    def test_the_first_of_many_broken_rows_are_named(self):
        audio, text = raw(60)
        text[20:40] = float("nan")
        with pytest.raises(
            ValueError, match=r"text embeddings of 20 of 60 .* \(rows 20, 21, 22, 23, 24, …\)\."
        ):
            KnowledgeBase.from_embeddings(audio, text)

    @pytest.mark.parametrize("ids", [[1, 2], torch.arange(61), []])
    def test_ids_of_another_number(self, ids):
        with pytest.raises(
            ValueError, match=r"`ids` has to hold one id for each of the 60 pairs, but got \("
        ):
            make(ids=ids)

    @pytest.mark.parametrize("ids", [torch.zeros(60), [0.5] * 60, torch.zeros(60, 1, dtype=torch.int64)])
    def test_ids_that_are_no_identifiers(self, ids):
        with pytest.raises(ValueError, match=r"`ids` has to .* integers"):
            make(ids=ids)

    @pytest.mark.parametrize("pairing", ["hungarian", "", None])
    def test_pairing(self, pairing):
        message = rf"`prototype_pairing` has to be one of \('matched', .*\), but got {pairing!r}\."
        with pytest.raises(ValueError, match=message):
            make(prototype_pairing=pairing)

    @pytest.mark.parametrize("number", [-2, -1])
    def test_number_of_prototypes(self, number):
        with pytest.raises(
            ValueError, match=rf"`num_prototypes` has to be an integer of at least 0, but got {number}\."
        ):
            make(num_prototypes=number)


class TestWarned:
    def test_more_prototypes_than_pairs(self):
        with pytest.warns(
            UserWarning, match=r"fewer pairs \(20\) than prototypes asked for \(512\)"
        ) as caught:
            base = KnowledgeBase.from_embeddings(*raw(20))
        assert len(caught) == 1
        assert "`num_prototypes` becomes 20" in str(caught[0].message)
        assert caught[0].filename == __file__
        assert torch.equal(base.coarse.audio, base.fine.audio)
        assert torch.equal(base.coarse.text, base.fine.text)

    def test_as_many_prototypes_as_pairs(self, recwarn):
        base = make(20, num_prototypes=20)
        assert len(base.coarse) == 20
        assert len(recwarn) == 0

    def test_zero_rows_are_counted_and_stay_zero(self):
        audio, text = raw(60)
        audio[[4, 9]] = 0
        text[7] = -0.0
        with pytest.warns(UserWarning, match="embeddings of . of 60 source rows are all zero") as caught:
            base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=5)
        assert [str(warning.message)[:36] for warning in caught] == [
            "The audio embeddings of 2 of 60 sour",
            "The text embeddings of 1 of 60 sourc",
        ]
        assert {warning.filename for warning in caught} == {__file__}
        assert bool((base.fine.audio[[4, 9]] == 0).all())
        assert bool((base.fine.text[7] == 0).all())
        for side in (base.fine, base.coarse):
            assert bool(side.audio.isfinite().all())
            assert bool(side.text.isfinite().all())
        found = base.lookup(base.fine.audio[[4, 5]], base.fine.text[[4, 7]], 60)["fine"]
        assert all(sorted(rows) == list(range(60)) for rows in found.audio_rows.tolist())

    def test_a_base_of_zeros(self):
        with pytest.warns(UserWarning, match="12 of 12 source rows are all zero"):
            base = KnowledgeBase.from_embeddings(torch.zeros(12, 3), torch.zeros(12, 3), num_prototypes=4)
        found = base.lookup(torch.zeros(2, 3), torch.zeros(2, 3), 3)
        assert found["fine"].audio_rows.tolist() == [[0, 1, 2]] * 2
        assert bool((found["coarse"].audio_by_audio == 0).all())


class TestCopies:
    def test_a_deep_copy_is_the_base_itself(self):
        base = make()
        assert copy.deepcopy(base) is base
        holder = torch.nn.Linear(1, 1)
        holder.knowledge = base
        assert copy.deepcopy(holder).knowledge is base

    @pytest.mark.parametrize("index", ["exact", "auto", "Flat", "HNSW8", "IVF4,Flat;nprobe=4"])
    def test_pickling_after_a_search(self, index):
        if index not in ("exact", "auto"):
            pytest.importorskip("faiss")
        base = make(600, index=index, ids=[f"clip {i // 3}" for i in range(600)])
        audio, text = directions(7, 6, 5), directions(7, 6, 6)
        before = base.lookup(audio, text, 4)
        stored = pickle.dumps(base)
        copied = pickle.loads(stored)
        assert copied is not base
        assert copied.fingerprint == base.fingerprint
        assert copied.fine.index == index
        assert isinstance(copied.fine.search_audio, type(base.fine.search_audio))
        after = copied.lookup(audio, text, 4)
        for name in before:
            for one, other in zip(tensors_in(before[name]), tensors_in(after[name]), strict=True):
                assert torch.equal(one, other)
        tensors = (base.fine.audio, base.fine.text, base.coarse.audio, base.coarse.text, base.ids)
        assert len(stored) < sum(tensor.nbytes for tensor in tensors) + 5000  # without the index

    def test_moving_to_where_it_is(self):
        base = make()
        assert base.to("cpu") is base

    def test_moving(self):
        base = make(index="exact").to("meta")
        assert base.device == torch.device("meta")
        assert base.fine.index == "exact"
        assert {tensor.device.type for tensor in tensors_of(base).values()} == {"meta"}

    def test_indexes_are_built_when_first_needed(self):
        base = make(index="auto")
        assert "search_audio" not in vars(base.fine)
        assert base.fine.search_audio is base.fine.search_audio
        assert isinstance(base.fine.search_audio, FastestExactSearch)

    def test_prototypes_are_searched_exactly(self):
        pytest.importorskip("faiss")
        base = make(index="HNSW8")
        assert isinstance(base.fine.search_text, FaissSearch)
        assert isinstance(base.coarse.search_text, ExactSearch)

    def test_frozen(self):
        with pytest.raises(AttributeError, match="cannot assign to field 'audio'"):
            make().fine.audio = torch.zeros(1)


class TestFingerprint:
    def test_the_same_numbers_have_the_same(self):
        base = make()
        assert re.fullmatch("[0-9a-f]{16}", base.fingerprint)
        assert make().fingerprint == base.fingerprint
        assert make(index="exact").fingerprint == base.fingerprint
        fine = StoredPairs(base.fine.audio.T.contiguous().T, base.fine.text.clone())
        assert KnowledgeBase(fine, base.coarse, base.ids).fingerprint == base.fingerprint

    @pytest.mark.parametrize("name", ["fine_audio", "fine_text", "coarse_audio", "coarse_text", "ids"])
    def test_one_other_number_changes_it(self, name):
        base = make()
        tensors = {key: tensor.clone() for key, tensor in tensors_of(base).items()}
        flat = tensors[name].view(-1)
        flat[-1] = flat[-1] + 1 if name == "ids" else torch.nextafter(flat[-1], torch.tensor(9.0))
        other = KnowledgeBase(
            StoredPairs(tensors["fine_audio"], tensors["fine_text"]),
            StoredPairs(tensors["coarse_audio"], tensors["coarse_text"]),
            tensors["ids"],
        )
        assert other.fingerprint != base.fingerprint

    def test_the_order_of_rows_and_the_precision_count(self):
        audio, text = raw(60)
        base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=5)
        for other in ((audio.flip(0), text.flip(0)), (text, audio), (audio.double(), text.double())):
            assert KnowledgeBase.from_embeddings(*other, num_prototypes=5).fingerprint != base.fingerprint


def test_only_prototypes_that_are_not_normalised_are_longer_than_one():
    assert make().fine.is_bounded
    assert make().coarse.is_bounded
    assert not make(normalize_prototypes=False).coarse.is_bounded


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_on_a_gpu(device):
    audio, text = raw(600)
    base = KnowledgeBase.from_embeddings(audio.to(device), text.to(device), num_prototypes=9)
    assert {tensor.device.type for tensor in tensors_of(base).values()} == {"cuda"}
    here = base.to("cpu")
    assert here.device == torch.device("cpu")
    assert here.fingerprint == base.fingerprint
    found = base.lookup(audio[:5].to(device), text[:5].to(device), 4, exclude_ids=[0, 1, 2, 3, 4])
    for name, expected in here.lookup(audio[:5], text[:5], 4, exclude_ids=[0, 1, 2, 3, 4]).items():
        assert torch.equal(found[name].audio_rows.cpu(), expected.audio_rows)
        assert torch.equal(found[name].text_rows.cpu(), expected.text_rows)
    with pytest.raises(ValueError, match=r"lies on cuda:0, but was asked from cpu"):
        base.lookup(audio[:5], text[:5], 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_of_any_length_are_brought_to_unit_length_or_refused(dtype):
    rows = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    largest = torch.finfo(dtype).max / 8
    rows[3] *= largest
    if dtype == torch.float16:
        base = KnowledgeBase.from_embeddings(rows, rows, num_prototypes=2)
        torch.testing.assert_close(base.fine.audio.norm(dim=1), torch.ones(6))
        return
    # Of such a row float32 makes zeros, for its length overflows.
    with pytest.raises(ValueError, match=r"audio embeddings of 1 of 6 source rows contain NaN or Inf"):
        KnowledgeBase.from_embeddings(rows, rows, num_prototypes=2)
    base = KnowledgeBase.from_embeddings(rows[:3], rows[:3], num_prototypes=2)
    with pytest.raises(ValueError, match="1 of the 1 rows to replace contain NaN or Inf"):
        base.replace_rows(torch.tensor([1]), rows[3:4], rows[:1])
    rows[0] = 1e-30
    with pytest.warns(UserWarning, match="1 of 3 source rows are all zero"):
        KnowledgeBase.from_embeddings(rows[:3], rows[:3], num_prototypes=2)
