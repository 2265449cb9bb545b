"""The gradient of `ReliabilityOTLoss` against finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import reference
from tests.helpers.loss_cases import make_case, make_loss

SMALL = {"batch": 4, "width": 4, "pairs": 9, "prototypes": 4}
# Strong enough for every part to matter.
STRONG = {"injection_ratio": 0.4, "ot_factor": 0.5, "lambda_fine": 0.4, "lambda_coarse": 0.5}


def small_case():
    """Retrieval stays as it is when embeddings move by a finite difference."""
    case = make_case(seed=3, **SMALL)
    assert case.margin() > 1e-3
    return case


@pytest.mark.parametrize(
    "options",
    [
        {"granularities": ("fine",)},
        {"granularities": ("coarse",), "plan_scaling": "row"},
        {"plan_scaling": "row"},
        {"plan_scaling": "row", "sinkhorn_epsilon": 0.02},
        {"modulation": "sample"},
        {"renormalize_injected": True},
        {"positives": "ids", "exclude_self": True},
        {"plan_scaling": "row", "modulation": "sample", "renormalize_injected": True, "positives": "ids"},
    ],
    ids=str,
)
def test_gradcheck(options):
    """With nothing held constant the gradient is that of the value."""
    case = small_case()
    options = STRONG | options | {"detach_plan": False}
    assert torch.autograd.gradcheck(
        lambda audio, text: case.loss(audio, text, **options),
        (case.audio.requires_grad_(), case.text.requires_grad_()),
        atol=1e-6,
    )


@pytest.mark.parametrize("switched_off", [*STRONG, None])
def test_gradcheck_with_parts_off(switched_off):
    case = small_case()
    options = STRONG | ({switched_off: 0.0} if switched_off else {}) | {"detach_plan": False}
    assert torch.autograd.gradcheck(
        lambda audio, text: case.loss(audio, text, **options),
        (case.audio.requires_grad_(), case.text.requires_grad_()),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularities": ("fine",)},
        {"granularities": ("coarse",)},
        {"plan_scaling": "row"},
        {"detach_plan": False, "plan_scaling": "row"},
        {"modulation": "sample"},
        {"modulation_gradient": False},
        {"modulation_gradient": False, "modulation": "sample"},
        {"modulation_gradient": False, "detach_plan": False},
        {"renormalize_injected": True, "positives": "ids", "exclude_self": True},
    ],
    ids=str,
)
def test_agrees_with_differences_of_the_reference(options):
    """What an option detaches is held constant in the difference quotient."""
    case = small_case()
    options = STRONG | options
    hold = ["rows"]
    if options.get("detach_plan", True):
        hold.append("plans")
    if not options.get("modulation_gradient", True):
        hold.append("factors")
    start = case.reference(**options)

    def value(audio: np.ndarray, text: np.ndarray) -> float:
        return case.reference(audio, text, held=start, hold=tuple(hold), **options).loss

    audio, text = case.audio.numpy().copy(), case.text.numpy().copy()
    case.loss(case.audio.requires_grad_(), case.text.requires_grad_(), **options).backward()
    by_audio = reference.gradient(lambda x: value(x, text), audio)
    by_text = reference.gradient(lambda x: value(audio, x), text)
    np.testing.assert_allclose(case.audio.grad.numpy(), by_audio, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(case.text.grad.numpy(), by_text, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("option", ["detach_plan", "modulation_gradient"])
def test_options_of_the_backward_pass_leave_the_value_and_change_the_gradient(option):
    case = small_case()
    values, gradients = [], []
    for chosen in (True, False):
        audio = case.audio.clone().requires_grad_()
        loss = case.loss(audio, **STRONG, plan_scaling="row", **{option: chosen})
        loss.backward()
        values.append(loss.detach())
        gradients.append(audio.grad)
    torch.testing.assert_close(*values, rtol=1e-13, atol=0)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_modulation_pulls_towards_the_retrieved_neighbours():
    """A small step against the modulation's part of the gradient raises the reliability."""
    case = small_case()
    audio = case.audio.clone().requires_grad_()
    options = {"granularities": ("fine",), "lambda_fine": 0.9, "lambda_coarse": 0.0}
    (full,) = torch.autograd.grad(case.loss(audio, **options), audio)
    (without,) = torch.autograd.grad(case.loss(audio, modulation_gradient=False, **options), audio)
    stepped = (case.audio - 1e-3 * (full - without)).numpy()
    before = case.reference(**options).potentials["fine"][0]
    after = case.reference(stepped, **options).potentials["fine"][0]
    assert np.log(after).mean() > np.log(before).mean()


def test_knowledge_receives_no_gradient():
    case = small_case()
    case.loss(case.audio.requires_grad_(), case.text.requires_grad_()).backward()
    for side in (case.base.fine, case.base.coarse):
        assert not side.audio.requires_grad
        assert not side.text.requires_grad


class TestTemperature:
    @pytest.mark.parametrize("shape", [(), (1,)])
    def test_parameter_is_learned(self, shape):
        case = small_case()
        temperature = nn.Parameter(torch.full(shape, 0.3, dtype=torch.float64))
        loss = case.loss(temperature=temperature)
        assert loss.shape == ()
        assert torch.equal(loss, case.loss(temperature=0.3))
        loss.backward()
        slope = (
            case.reference(temperature=0.3 + 1e-6).loss - case.reference(temperature=0.3 - 1e-6).loss
        ) / 2e-6
        np.testing.assert_allclose(temperature.grad.sum().item(), slope, rtol=1e-6)

    def test_parameter_stays_the_models_own(self):
        module = make_loss(temperature=nn.Parameter(torch.tensor(0.3)))
        assert list(module.parameters()) == []
        assert module.state_dict() == {}

    def test_callable_is_read_at_every_call(self):
        case = small_case()
        log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        module = make_loss(temperature=lambda: 1 / log_scale.exp())
        first = module(case.audio, case.text, knowledge=case.base)
        first.backward()
        assert log_scale.grad.abs() > 0
        np.testing.assert_allclose(first.item(), case.reference(temperature=np.exp(-1.0)).loss, rtol=1e-12)
        with torch.no_grad():
            log_scale.fill_(2.0)
        second = module(case.audio, case.text, knowledge=case.base)
        np.testing.assert_allclose(second.item(), case.reference(temperature=np.exp(-2.0)).loss, rtol=1e-12)

    def test_half_precision_parameter_under_autocast(self):
        case = make_case(dtype=torch.float32)
        temperature = nn.Parameter(torch.tensor(0.25, dtype=torch.bfloat16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.loss(temperature=temperature)
        torch.testing.assert_close(loss, case.loss(temperature=0.25), rtol=1e-6, atol=0)
        loss.backward()
        assert temperature.grad.isfinite()
