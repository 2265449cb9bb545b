"""The value of `ReliabilityOTLoss` against the float64 reference of the whole method."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.knowledge import KnowledgeBase, StoredPairs
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from tests.helpers.loss_cases import Case, make_case, make_loss

GRANULARITIES = [("fine",), ("coarse",), ("fine", "coarse")]
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "num_neighbors": st.sampled_from([1, 2, 5, 8]),  # 8 is more than there are prototypes
        "injection_ratio": st.sampled_from([0.0, 0.2, 0.9, 1.0]),
        "ot_factor": st.sampled_from([0.0, 0.2, 0.9, 1.0]),
        "lambda_fine": st.sampled_from([0.0, 0.2, 0.6]),
        "lambda_coarse": st.sampled_from([0.0, 0.3]),
        "temperature": st.sampled_from([0.05, 0.3, 1.0]),
        "sinkhorn_epsilon": st.sampled_from([0.01, 0.03, 0.1, 1.0]),
        "sinkhorn_iterations": st.sampled_from([1, 5, 50]),
        "granularities": st.sampled_from(GRANULARITIES),
        "renormalize_injected": st.booleans(),
        "plan_scaling": st.sampled_from(["marginal", "row"]),
        "a2t_realignment": st.sampled_from(["transposed_plan", "transposed_result", "same_plan"]),
        "detach_plan": st.booleans(),
        "exclude_self": st.booleans(),
        "distinct_clips": st.booleans(),
        "positives": st.sampled_from(["diagonal", "ids"]),
        "reliability_form": st.sampled_from(["disagreement_factor", "agreement_factor"]),
        "modulation": st.sampled_from(["batch", "sample"]),
        "modulation_gradient": st.booleans(),
    },
)


@pytest.mark.parametrize("granularities", GRANULARITIES)
@pytest.mark.parametrize(
    ("injection_ratio", "ot_factor", "lambda_fine", "lambda_coarse"),
    list(product([0.0, 0.2], [0.0, 0.2], [0.0, 0.2], [0.0, 0.3])),
)
def test_each_part_on_and_off(injection_ratio, ot_factor, lambda_fine, lambda_coarse, granularities):
    case = make_case()
    options = {
        "injection_ratio": injection_ratio,
        "ot_factor": ot_factor,
        "lambda_fine": lambda_fine,
        "lambda_coarse": lambda_coarse,
        "granularities": granularities,
    }
    loss = case.loss(**options)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.item(), case.reference(**options).loss, rtol=1e-11)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(options=OPTIONS, seed=st.integers(0, 10_000), batch=st.integers(2, 7))
def test_any_combination_of_options(options, seed, batch):
    case = make_case(seed, batch=batch)
    expected = case.reference(**options).loss
    np.testing.assert_allclose(case.loss(**options).item(), expected, rtol=1e-10, atol=1e-12)


def test_paper_defaults():
    case = make_case(batch=8, width=16, pairs=40, prototypes=12)
    loss = ReliabilityOTLoss()(case.audio, case.text, knowledge=case.base)
    expected = case.reference(
        num_neighbors=10,
        injection_ratio=0.2,
        ot_factor=0.2,
        lambda_fine=0.2,
        lambda_coarse=0.3,
        temperature=0.07,
        sinkhorn_epsilon=0.1,
        sinkhorn_iterations=50,
        granularities=("fine", "coarse"),
        renormalize_injected=False,
        plan_scaling="marginal",
        exclude_self=False,
        positives="diagonal",
        modulation="batch",
    )
    np.testing.assert_allclose(loss.item(), expected.loss, rtol=1e-11)


@pytest.mark.parametrize("index", ["auto", "exact", "Flat"])
def test_float32(index):
    case = make_case(seed=1, batch=16, width=32, pairs=100, prototypes=10, dtype=torch.float32, index=index)
    assert case.margin() > 1e-5
    loss = case.loss()
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), case.reference().loss, rtol=3e-6)


@pytest.mark.parametrize("prototype_pairing", ["matched", "joint", "audio", "text", "index"])
@pytest.mark.parametrize("normalize_prototypes", [True, False])
def test_any_prototypes(prototype_pairing, normalize_prototypes):
    """Also prototypes that are longer than one, whose similarities leave [-1, 1]."""
    case = make_case(prototype_pairing=prototype_pairing, normalize_prototypes=normalize_prototypes)
    # A small ε, at which the transport plan of long vectors needs the log domain.
    options = {"sinkhorn_epsilon": 0.03, "injection_ratio": 0.9, "plan_scaling": "row"}
    expected = case.reference(**options).loss
    np.testing.assert_allclose(case.loss(**options).item(), expected, rtol=1e-10)


def test_vectors_too_long_for_exponentials_in_float32():
    case = make_case(dtype=torch.float32)
    longer = StoredPairs(30 * case.base.coarse.audio, 30 * case.base.coarse.text)
    case.base = KnowledgeBase(case.base.fine, longer, case.base.ids)
    options = {
        "granularities": ("coarse",),
        "num_neighbors": 1,
        "injection_ratio": 0.9,
        "ot_factor": 0.9,
        "plan_scaling": "row",
        "sinkhorn_epsilon": 0.03,
        "lambda_fine": 0.0,
        "lambda_coarse": 0.0,
    }
    np.testing.assert_allclose(case.loss(**options).item(), case.reference(**options).loss, rtol=1e-3)


@pytest.mark.parametrize("num_neighbors", [1, 2, 3, 5])
def test_equal_scores_are_ordered_by_row(num_neighbors):
    """Vectors of ±½ in four dimensions: all products are exact, and only five values occur."""
    generator = torch.Generator().manual_seed(0)

    def signs(rows: int) -> torch.Tensor:
        return torch.randint(2, (rows, 4), generator=generator, dtype=torch.float64) - 0.5

    base = KnowledgeBase.from_embeddings(signs(30), signs(30), num_prototypes=1)
    case = Case(signs(6), signs(6), torch.arange(6), base)
    assert case.margin(num_neighbors) == 0
    options = {"num_neighbors": num_neighbors, "granularities": ("fine",)}
    np.testing.assert_allclose(case.loss(**options).item(), case.reference(**options).loss, rtol=1e-12)


def test_excluding_the_own_clip_is_a_base_without_it():
    case = make_case()
    nearest = case.reference().rows["fine"][0][0, 0]
    case.ids = case.base.ids[nearest].expand(6)
    others = case.base.ids != case.ids[0]
    assert (~others).sum() == 2
    smaller = KnowledgeBase.from_embeddings(
        case.base.fine.audio[others], case.base.fine.text[others], num_prototypes=2
    )
    expected = make_loss(granularities=("fine",))(case.audio, case.text, knowledge=smaller)
    loss = case.loss(granularities=("fine",), exclude_self=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert loss != case.loss(granularities=("fine",))


def test_other_captions_of_a_clip_do_not_matter_as_negatives():
    case = make_case()
    case.ids = torch.zeros(6, dtype=torch.long)
    # Nothing is left to contrast with.
    assert case.loss(positives="ids").item() == pytest.approx(0, abs=1e-14)
    case.ids = torch.arange(6)
    torch.testing.assert_close(case.loss(positives="ids"), case.loss(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda ids: ids.tolist(), id="list of int"),
        pytest.param(lambda ids: ids.int(), id="int32 tensor"),
        pytest.param(lambda ids: ids.numpy(), id="numpy array"),
        pytest.param(lambda ids: list(ids.numpy()), id="list of numpy integers"),
        pytest.param(lambda ids: list(ids), id="list of 0-d tensors"),
    ],
)
def test_integer_ids_of_any_container_are_the_same_ids(convert):
    """One part of a data pipeline yields tensors, another numpy integers; the clips are the same."""
    case = make_case()
    module = make_loss(exclude_self=True, positives="ids")
    expected = module(case.audio, case.text, ids=case.ids, knowledge=case.base)
    actual = module(case.audio, case.text, ids=convert(case.ids), knowledge=case.base)
    assert torch.equal(actual, expected)


def test_string_ids():
    case = make_case()

    def named(ids: torch.Tensor) -> list[str]:
        return [f"clip {i}.wav" for i in ids.tolist()]

    base = KnowledgeBase.from_embeddings(
        case.base.fine.audio, case.base.fine.text, ids=named(case.base.ids), num_prototypes=5
    )
    module = make_loss(exclude_self=True, positives="ids")
    expected = module(case.audio, case.text, ids=case.ids, knowledge=case.base)
    assert torch.equal(module(case.audio, case.text, ids=named(case.ids), knowledge=base), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_half_precision_under_autocast_is_computed_in_float32(half, requires_grad):
    case = make_case(batch=16, width=32, pairs=100, prototypes=10, dtype=torch.float32)
    audio, text = (x.to(half).requires_grad_(requires_grad) for x in (case.audio, case.text))
    expected = case.loss(audio.detach().float(), text.detach().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(audio, text)
        mixed = case.loss(audio, text.detach().float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(mixed, expected)
    if requires_grad:
        loss.backward()
        assert audio.grad.dtype == half
        assert audio.grad.isfinite().all()
        assert audio.grad.abs().sum() > 0
