"""`find_transport_solver`: the solvers of POT by name, and what it refuses."""

import pickle
import sys

import numpy as np
import pytest
import torch

from ask_lightning.functional import find_transport_solver, sinkhorn_plan, transport_solvers
from tests.helpers import reference

BALANCED = [
    "pot:sinkhorn",
    "pot:sinkhorn_log",
    "pot:sinkhorn_stabilized",
    "pot:sinkhorn;method=sinkhorn_log",
    "pot:greenkhorn",
]


def similarities(batch: int = 6, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, batch, generator=generator, dtype=torch.float64) / 2).tanh().to(dtype)


def test_the_librarys_own_is_the_function_itself():
    assert find_transport_solver("sinkhorn") is sinkhorn_plan


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_solvers_agree_with_the_reference(name):
    similarity = similarities()
    plan = find_transport_solver(name)(similarity, 0.5, 5000)
    expected = reference.sinkhorn_plan(similarity.numpy(), 0.5)
    np.testing.assert_allclose(plan.numpy(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_gradient(dtype):
    similarity = similarities(dtype=dtype).requires_grad_()
    plan = find_transport_solver("pot:sinkhorn_log")(similarity, 0.5, 50)
    assert plan.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not plan.requires_grad


def test_number_of_iterations():
    similarity = similarities()
    few, many = (find_transport_solver("pot:sinkhorn_log")(similarity, 0.1, number) for number in (1, 500))
    assert (few - many).abs().max() > 1e-3
    marginal = torch.full((6,), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(many.sum(1), marginal, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "mass"),
    [
        ("pot:emd", 1.0),
        ("pot:partial_wasserstein;m=0.6", 0.6),
        ("pot:entropic_partial_wasserstein;m=0.6", 0.6),
        ("pot:mm_unbalanced;reg_m=0.2", None),
        ("pot:sinkhorn_unbalanced;reg_m=0.2", None),
    ],
)
def test_mass(name, mass):
    plan = find_transport_solver(name)(similarities(), 0.1, 200)
    assert (plan >= 0).all()
    assert plan.sum().item() == pytest.approx(mass, abs=1e-6) if mass else 0.1 < plan.sum() < 0.99


def test_it_is_pickled_with_the_loss():
    solver = find_transport_solver("pot:sinkhorn_unbalanced;reg_m=0.2")
    copy = pickle.loads(pickle.dumps(solver))
    assert torch.equal(copy(similarities(), 0.1, 20), solver(similarities(), 0.1, 20))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("emd", r'has to be "sinkhorn" or the name of a solver of POT .*but got \'emd\''),
        (None, r'has to be "sinkhorn" or .*but got None'),
        ("pot:nothing", r"one of POT's solvers \['emd', .*'sinkhorn_log'.* but got 'nothing'"),
        ("pot:emd2", r"one of POT's solvers .* but got 'emd2'"),
        ("pot:sinkhorn_unbalanced", r"of which it needs \['reg_m'\], but got \{\}"),
        ("pot:emd;reg=0.2", r"parameters out of \['numItermax'.*but got \{'reg': 0.2\}.* `sinkhorn_epsilon`"),
        ("pot:emd;speed=2", r"parameters out of .*but got \{'speed': 2\}"),
        ("pot:emd;numItermax", r"name=value behind semicolons, but got 'numItermax' in"),
        ("pot:emd;log=True", r"return a plan alone.*returns a tuple. Leave `log` out"),
        ("pot:partial_wasserstein;m=3", r"POT, whose `partial_wasserstein` failed with \{'m': 3\}: "),
    ],
)
def test_refused(name, message):
    with pytest.raises(ValueError, match=f"Argument `transport_solver` .*{message}"):
        find_transport_solver(name)


@pytest.mark.filterwarnings("ignore")  # those of POT
def test_a_plan_that_is_no_number():
    with pytest.raises(RuntimeError, match=r"NaN or Inf for an ε of 1e-06\. Raise `sinkhorn_epsilon`"):
        find_transport_solver("pot:greenkhorn")(similarities(), 1e-6, 50)


def test_without_pot(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    transport_solvers._pot_solvers.cache_clear()
    with pytest.raises(ImportError, match=r'`ot` is needed .*POT.*pip install "ask-lightning\[pot\]"'):
        find_transport_solver("pot:emd")
    transport_solvers._pot_solvers.cache_clear()
