"""What else a user of `ReliabilityOTLoss` relies on: symmetries, zeros, copies, and what it leaves alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ask_lightning.functional import out_of_batch_influence
from ask_lightning.knowledge import KnowledgeBase, StoredPairs
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from tests.helpers import reference
from tests.helpers.loss_cases import make_case, make_loss

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)
VARIANTS = st.sampled_from(
    [{}, {"plan_scaling": "row"}, {"modulation": "sample"}, {"positives": "ids", "exclude_self": True}]
)


def order(seed: int, length: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


@PROPERTY
@given(seed=st.integers(0, 10_000), options=VARIANTS)
def test_order_of_the_batch_is_immaterial(seed, options):
    case = make_case(seed)
    expected = case.loss(**options)
    batch = order(seed, 6)
    case.audio, case.text, case.ids = case.audio[batch], case.text[batch], case.ids[batch]
    torch.testing.assert_close(case.loss(**options), expected, rtol=1e-11, atol=1e-12)


@PROPERTY
@given(seed=st.integers(0, 10_000), options=VARIANTS)
def test_order_of_the_base_is_immaterial(seed, options):
    case = make_case(seed)
    expected = case.loss(**options)
    base, pairs, prototypes = case.base, order(seed, 17), order(seed + 1, 5)
    case.base = KnowledgeBase(
        StoredPairs(base.fine.audio[pairs], base.fine.text[pairs]),
        StoredPairs(base.coarse.audio[prototypes], base.coarse.text[prototypes]),
        base.ids[pairs],
    )
    torch.testing.assert_close(case.loss(**options), expected, rtol=1e-11, atol=1e-12)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_exchanging_audio_and_text_everywhere_is_immaterial(seed):
    # To convergence: only then is the plan of the transpose the transpose of the plan.
    options = {"sinkhorn_iterations": 200, "sinkhorn_epsilon": 1.0, "plan_scaling": "row"}
    case = make_case(seed)
    expected = case.loss(**options)
    base = case.base
    case.base = KnowledgeBase(
        StoredPairs(base.fine.text, base.fine.audio),
        StoredPairs(base.coarse.text, base.coarse.audio),
        base.ids,
    )
    torch.testing.assert_close(case.loss(case.text, case.audio, **options), expected, rtol=1e-9, atol=0)


@PROPERTY
@given(seed=st.integers(0, 10_000))
def test_length_of_the_embeddings_is_immaterial(seed):
    case = make_case(seed)
    scaled = case.loss(case.audio * 1000, case.text / 1000)
    torch.testing.assert_close(scaled, case.loss(), rtol=1e-11, atol=1e-12)


@PROPERTY
@given(seed=st.integers(0, 10_000), lambda_fine=st.floats(0, 0.6), lambda_coarse=st.floats(0, 0.39))
def test_modulation_stays_within_its_bounds(seed, lambda_fine, lambda_coarse):
    case = make_case(seed)
    plain = case.loss(lambda_fine=0.0, lambda_coarse=0.0).item()
    modulated = case.loss(lambda_fine=lambda_fine, lambda_coarse=lambda_coarse).item()
    reach = lambda_fine + lambda_coarse
    assert (1 - reach) * plain - 1e-12 <= modulated <= (1 + reach) * plain + 1e-12


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
@pytest.mark.parametrize(
    ("options", "hold"),
    [
        ({}, ("rows", "plans")),
        ({"plan_scaling": "row", "detach_plan": False}, ("rows",)),
        ({"modulation": "sample", "modulation_gradient": False}, ("rows", "plans", "factors")),
        ({"injection_ratio": 0.0}, ("rows", "plans")),
    ],
    ids=str,
)
def test_influence_of_the_base(options, hold, granularity):
    """Eq. 2 through the loss's looked-up rows is Eq. 2 with every entry of the base moved."""
    case = make_case(seed=3, batch=3, width=4, pairs=9, prototypes=4)
    assert case.margin() > 1e-3
    options = options | {"granularities": (granularity,)}
    module = make_loss(**options)
    audio, text = F.normalize(case.audio, dim=1), F.normalize(case.text, dim=1)
    near = module.retrieve(audio, text, case.base)[granularity]
    near = near.map_vectors(torch.Tensor.requires_grad_)
    loss, _ = module.from_neighborhoods(audio, text, {granularity: near})
    influence = out_of_batch_influence(
        loss,
        [(near.audio_rows, near.audio_by_audio), (near.text_rows, near.audio_by_text)],
        [(near.audio_rows, near.text_by_audio), (near.text_rows, near.text_by_text)],
        num_rows=len(getattr(case.base, granularity)),
    )
    start = case.reference(**options)

    def moved(*base: np.ndarray) -> float:
        return case.reference(bases={granularity: base}, held=start, hold=hold, **options).loss

    expected = reference.out_of_batch_influence(moved, case.bases()[granularity])
    np.testing.assert_allclose(influence.item(), expected, rtol=1e-7)


class TestZeros:
    @pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3, 4, 5]])
    @pytest.mark.parametrize("sides", ["audio", "text", "both"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"renormalize_injected": True},
            {"detach_plan": False, "plan_scaling": "row"},
            {"injection_ratio": 0.0},
        ],
        ids=str,
    )
    def test_zero_embeddings_give_finite_values_and_gradients(self, sides, rows, options):
        case = make_case(dtype=torch.float32)
        if sides in ("audio", "both"):
            case.audio[rows] = 0
        if sides in ("text", "both"):
            case.text[rows] = 0
        loss = case.loss(case.audio.requires_grad_(), case.text.requires_grad_(), **options)
        loss.backward()
        assert loss.isfinite()
        assert case.audio.grad.isfinite().all()
        assert case.text.grad.isfinite().all()

    @pytest.mark.filterwarnings("ignore:.*all zero")
    def test_zero_knowledge(self):
        """Nothing to inject and nothing to agree with: Ψ = 1, F = 0."""
        case = make_case()
        case.base = KnowledgeBase.from_embeddings(torch.zeros(17, 5), torch.zeros(17, 5), num_prototypes=3)
        loss = case.loss(case.audio.requires_grad_(), case.text.requires_grad_())
        loss.backward()
        np.testing.assert_allclose(loss.item(), case.reference().loss, rtol=1e-12)
        assert case.audio.grad.isfinite().all()


class TestKnowledge:
    def test_argument_goes_before_the_attribute_and_does_not_replace_it(self):
        case, other = make_case(0), make_case(1)
        module = make_loss()
        module.knowledge = other.base
        assert torch.equal(module(case.audio, case.text, knowledge=case.base), case.loss())
        assert module.knowledge is other.base
        by_attribute = module(case.audio, case.text)
        assert torch.equal(by_attribute, module(case.audio, case.text, knowledge=other.base))

    def test_same_loss_in_training_and_evaluation(self):
        case = make_case()
        module = make_loss()
        module.knowledge = case.base
        assert torch.equal(module(case.audio, case.text), module.eval()(case.audio, case.text))

    def test_is_neither_a_buffer_nor_in_the_state(self):
        module = make_loss()
        module.knowledge = make_case().base
        assert module.state_dict() == {}
        assert list(module.buffers()) == []
        assert list(module.parameters()) == []


class WithLearnedTemperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.loss = make_loss(temperature=self.temperature)


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    @pytest.mark.parametrize("called_before", [False, True])
    def test_copy_gives_the_same_loss(self, duplicate, called_before):
        case = make_case()
        module = make_loss(plan_scaling="row", modulation="sample", granularities=("coarse",))
        module.knowledge = case.base
        if called_before:
            module(case.audio.requires_grad_(), case.text)
        copied = duplicate(module)
        assert torch.equal(copied(case.audio, case.text), module(case.audio, case.text))
        assert not copied.last.keys() ^ module.last.keys()

    def test_copy_without_knowledge(self):
        copied = pickle.loads(pickle.dumps(make_loss()))
        assert copied.knowledge is None
        case = make_case()
        assert torch.equal(copied(case.audio, case.text, knowledge=case.base), case.loss())

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copy_of_a_model_has_its_own_learned_temperature(self, duplicate):
        case, model = make_case(), WithLearnedTemperature()
        copied = duplicate(model)
        copied.loss(case.audio, case.text, knowledge=case.base).backward()
        assert copied.temperature.grad is not None
        assert model.temperature.grad is None


class TestLast:
    def test_terms_are_detached_and_finite(self):
        case = make_case()
        module = make_loss(detach_plan=False)
        loss = module(case.audio.requires_grad_(), case.text.requires_grad_(), knowledge=case.base)
        assert loss.requires_grad
        assert module.last
        for name, term in module.last.items():
            assert not term.requires_grad, name
            assert term.isfinite().all(), name

    def test_terms_are_those_of_the_last_call(self):
        case, other = make_case(0), make_case(1)
        module = make_loss()
        module(case.audio, case.text, knowledge=case.base)
        first = module.last
        module(other.audio, other.text, knowledge=other.base)
        assert first.keys() == module.last.keys()
        assert any(not torch.equal(first[name], module.last[name]) for name in first)

    def test_is_empty_before_the_first_call(self):
        assert not make_loss().last


def test_global_random_state_and_inputs_are_left_alone():
    case = make_case()
    audio, text, state = case.audio.clone(), case.text.clone(), torch.get_rng_state()
    case.loss()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(case.audio, audio)
    assert torch.equal(case.text, text)


def test_same_call_gives_the_same_bits():
    case = make_case(batch=64, width=32, pairs=200, dtype=torch.float32)
    assert torch.equal(case.loss(), case.loss())


def test_works_inside_no_grad_and_inference_mode():
    case = make_case()
    expected = case.loss()
    with torch.no_grad():
        assert torch.equal(case.loss(), expected)
    with torch.inference_mode():
        assert torch.equal(case.loss(), expected)


def test_repr_names_what_the_paper_varies():
    text = repr(ReliabilityOTLoss(num_neighbors=7, injection_ratio=0.25))
    assert "num_neighbors=7" in text
    assert "injection_ratio=0.25" in text


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_unit_vectors_in_half_precision_count_as_bounded(storage):
    """They are a little longer than one; the fast transport plan is for them, too."""
    audio, text = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    base = KnowledgeBase.from_embeddings(audio, text, num_prototypes=4, storage=storage)
    assert bool((base.fine.audio.double().norm(dim=1) > 1).any())
    assert ReliabilityOTLoss().is_bounded(base)
    longer = KnowledgeBase.from_embeddings(
        audio, text, num_prototypes=4, storage=storage, normalize_prototypes=False
    )
    assert not ReliabilityOTLoss().is_bounded(longer)
