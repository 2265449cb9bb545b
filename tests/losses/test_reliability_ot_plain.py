"""With everything switched off, `ReliabilityOTLoss` is plain symmetric NT-Xent, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.loss_cases import PLAIN, TEMPERATURE, make_case, make_loss

CASES = [
    pytest.param(batch, width, dtype, id=f"{batch}x{width}-{dtype}")
    for batch, width in [(2, 3), (7, 5), (32, 64), (250, 128)]
    for dtype in (torch.float32, torch.float64)
]


def nt_xent(audio: Tensor, text: Tensor) -> Tensor:
    """Eq. 16 by hand. Dividing the logits once instead of in each direction rounds differently."""
    similarity = text @ audio.T
    pairs = torch.arange(len(similarity))
    text_to_audio = F.cross_entropy(similarity / TEMPERATURE, pairs)
    audio_to_text = F.cross_entropy(similarity.T / TEMPERATURE, pairs)
    return (text_to_audio + audio_to_text) / 2


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    off = [(ours - theirs).abs().max().item() for ours, theirs in zip(actual, expected, strict=True)]
    assert off == [0, 0, 0], "value, gradient by audio, gradient by text"


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
@pytest.mark.parametrize(("batch", "width", "dtype"), CASES)
def test_one_granularity(batch, width, dtype, granularity):
    case = make_case(batch=batch, width=width, dtype=dtype)
    module = make_loss(**PLAIN, granularities=(granularity,))
    expected = value_and_gradients(
        lambda audio, text: nt_xent(F.normalize(audio, dim=1), F.normalize(text, dim=1)),
        case.audio,
        case.text,
    )
    actual = value_and_gradients(lambda *x: module(*x, knowledge=case.base), case.audio, case.text)
    assert_bitwise(actual, expected)


@pytest.mark.parametrize(("batch", "width", "dtype"), CASES)
def test_model_that_normalises_its_embeddings(batch, width, dtype):
    """The gradient also arrives unchanged at what the model normalised."""
    case = make_case(batch=batch, width=width, dtype=dtype)
    module = make_loss(**PLAIN, granularities=("fine",))

    def normalised(function):
        return lambda audio, text: function(F.normalize(audio, dim=1), F.normalize(text, dim=1))

    expected = value_and_gradients(normalised(nt_xent), case.audio, case.text)
    actual = value_and_gradients(
        normalised(lambda *x: module(*x, knowledge=case.base)), case.audio, case.text
    )
    assert_bitwise(actual, expected)


def test_unit_embeddings_themselves():
    case = make_case(batch=32, width=64, dtype=torch.float32)
    unit = F.normalize(case.audio, dim=1), F.normalize(case.text, dim=1)
    module = make_loss(**PLAIN, granularities=("fine",))
    expected = value_and_gradients(nt_xent, *unit)
    assert_bitwise(value_and_gradients(lambda *x: module(*x, knowledge=case.base), *unit), expected)


@pytest.mark.parametrize(
    "option",
    [
        {"plan_scaling": "row"},
        {"detach_plan": False},
        {"renormalize_injected": True},
        {"modulation_gradient": False},
        {"sinkhorn_epsilon": 0.01},
        {"exclude_self": True},
        {"positives": "ids"},
    ],
    ids=str,
)
def test_options_of_what_is_off_do_not_matter(option):
    case = make_case(batch=32, width=64, pairs=100, dtype=torch.float32)
    module = make_loss(**PLAIN, **option, granularities=("fine",))
    expected = value_and_gradients(
        lambda audio, text: nt_xent(F.normalize(audio, dim=1), F.normalize(text, dim=1)),
        case.audio,
        case.text,
    )
    actual = value_and_gradients(
        lambda *x: module(*x, ids=torch.arange(32), knowledge=case.base), case.audio, case.text
    )
    assert_bitwise(actual, expected)


def test_modulation_by_sample_has_the_plain_gradient():
    """The value is a mean in another order, so it may differ in the last bit."""
    case = make_case(batch=32, width=64, dtype=torch.float32)
    module = make_loss(**PLAIN, modulation="sample", granularities=("fine",))
    expected = value_and_gradients(
        lambda audio, text: nt_xent(F.normalize(audio, dim=1), F.normalize(text, dim=1)),
        case.audio,
        case.text,
    )
    actual = value_and_gradients(lambda *x: module(*x, knowledge=case.base), case.audio, case.text)
    torch.testing.assert_close(actual[0], expected[0], rtol=3e-7, atol=0)
    assert_bitwise([expected[0], *actual[1:]], expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    injection_ratio=st.floats(0, 1),
    ot_factor=st.floats(0, 1),
    plan_scaling=st.sampled_from(["marginal", "row"]),
)
def test_unmodulated_granularities_add_up(seed, injection_ratio, ot_factor, plan_scaling):
    case = make_case(seed)
    options = PLAIN | {
        "injection_ratio": injection_ratio,
        "ot_factor": ot_factor,
        "plan_scaling": plan_scaling,
    }
    fine, coarse, both = (
        case.loss(granularities=names, **options) for names in (("fine",), ("coarse",), ("fine", "coarse"))
    )
    torch.testing.assert_close(both, fine + coarse, rtol=1e-13, atol=1e-14)


def test_two_plain_granularities_are_twice_one():
    case = make_case(batch=32, width=64, dtype=torch.float32)
    once = value_and_gradients(
        lambda *x: case.loss(*x, **PLAIN, granularities=("fine",)), case.audio, case.text
    )
    twice = value_and_gradients(lambda *x: case.loss(*x, **PLAIN), case.audio, case.text)
    for ours, single in zip(twice, once, strict=True):
        torch.testing.assert_close(ours, 2 * single, rtol=1e-6, atol=1e-8)


def test_evaluation_before_the_first_base_is_plain():
    case = make_case(batch=32, width=64)
    module = make_loss().eval()
    with pytest.warns(UserWarning, match="without knowledge, as plain NT-Xent"):
        loss = module(case.audio, case.text)
    torch.testing.assert_close(loss, case.loss(**PLAIN), rtol=1e-13, atol=0)
