"""`realign_similarity` and `realign_both_directions`, Eq. 15."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ask_lightning.functional import realign_both_directions, realign_similarity, sinkhorn_plan
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def sample(seed: int, batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    similarity = 2 * torch.rand(batch, batch, generator=generator, dtype=torch.float64) - 1
    return similarity, sinkhorn_plan(similarity)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("plan_scaling", ["marginal", "row"])
@pytest.mark.parametrize("ot_factor", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 4e-7)])
def test_agrees_with_reference(dtype, tolerance, ot_factor, plan_scaling, transposed):
    similarity, plan = (x.T if transposed else x for x in sample(0))
    realigned = realign_similarity(similarity.to(dtype), plan.to(dtype), ot_factor, plan_scaling=plan_scaling)
    expected = reference.realign_similarity(similarity.numpy(), plan.numpy(), ot_factor, plan_scaling)
    assert realigned.dtype == dtype
    np.testing.assert_allclose(realigned.double().numpy(), expected, rtol=0, atol=tolerance)


def test_defaults_are_the_papers():
    similarity, plan = sample(0)
    expected = realign_similarity(similarity, plan, 0.2, plan_scaling="marginal")
    assert torch.equal(realign_similarity(similarity, plan), expected)


@PROPERTY
@given(seed=st.integers(0, 10_000), plan_scaling=st.sampled_from(["marginal", "row"]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factor_zero_is_the_plain_similarity_bit_for_bit(dtype, seed, plan_scaling):
    similarity, plan = (x.to(dtype) for x in sample(seed))
    assert torch.equal(realign_similarity(similarity, plan, 0.0, plan_scaling=plan_scaling), similarity)


def test_factor_zero_passes_the_gradient_bit_for_bit():
    similarity, plan = sample(0)
    similarity.requires_grad_()
    incoming = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(realign_similarity(similarity, plan, 0.0), similarity, incoming)
    assert torch.equal(gradient, incoming)


@PROPERTY
@given(seed=st.integers(0, 10_000), ot_factor=st.floats(0, 1))
def test_row_scaling_keeps_realigned_similarities_in_range(seed, ot_factor):
    similarity, _ = sample(seed)
    plan = sinkhorn_plan(similarity, iterations=500)
    realigned = realign_similarity(similarity, plan, ot_factor, plan_scaling="row")
    assert realigned.abs().max() <= similarity.abs().max() + 1e-6


@PROPERTY
@given(batch=st.integers(2, 40), seed=st.integers(0, 10_000), ot_factor=st.floats(0, 1))
def test_marginal_scaling_differs_from_a_temperature_by_at_most_one_over_batch(batch, seed, ot_factor):
    similarity, _ = sample(seed, batch)
    plan = sinkhorn_plan(similarity, iterations=500)
    transported = realign_similarity(similarity, plan, ot_factor) - (1 - ot_factor) * similarity
    assert transported.abs().max() <= ot_factor / batch + 1e-6


@PROPERTY
@given(seed=st.integers(0, 10_000), plan_scaling=st.sampled_from(["marginal", "row"]))
def test_permuting_both_sides_permutes_result(seed, plan_scaling):
    similarity, plan = sample(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(6, generator=generator), torch.randperm(6, generator=generator)
    # (Q S)_{ij} = Σ_k Q_ik S_kj: queries on both axes of Q, so one permutation moves all of it.
    expected = realign_similarity(similarity, plan, 0.4, plan_scaling=plan_scaling)[rows][:, columns]
    permuted = realign_similarity(
        similarity[rows][:, columns], plan[rows][:, rows], 0.4, plan_scaling=plan_scaling
    )
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-14)


def test_identity_plan_with_row_scaling_changes_nothing():
    similarity, _ = sample(0)
    identity = torch.eye(6, dtype=torch.float64) / 6
    realigned = realign_similarity(similarity, identity, 0.7, plan_scaling="row")
    torch.testing.assert_close(realigned, similarity, rtol=0, atol=1e-15)


@pytest.mark.parametrize("plan_scaling", ["marginal", "row"])
def test_gradcheck(plan_scaling):
    similarity, plan = sample(0)
    assert torch.autograd.gradcheck(
        lambda s, q: realign_similarity(s, q, 0.3, plan_scaling=plan_scaling),
        (similarity.requires_grad_(), plan.requires_grad_()),
    )


def test_unknown_plan_scaling():
    with pytest.raises(
        ValueError, match=r"`plan_scaling` has to be one of \('marginal', 'row'\), but got 'rows'"
    ):
        realign_similarity(torch.eye(3), torch.eye(3) / 3, plan_scaling="rows")


class TestBothDirections:
    @pytest.mark.parametrize("plan_scaling", ["marginal", "row"])
    def test_agrees_with_sums(self, plan_scaling):
        similarity, plan = sample(1)
        s, q = similarity.numpy(), plan.numpy() * (6 if plan_scaling == "row" else 1)
        mixed = {
            "transposed_plan": np.einsum("tj,at->ja", q, s),
            "transposed_result": np.einsum("tk,ka->at", q, s),
            "same_plan": np.einsum("jt,at->ja", q, s),
        }
        for kind, transported in mixed.items():
            t2a, a2t = realign_both_directions(
                similarity, plan, 0.3, plan_scaling=plan_scaling, a2t_realignment=kind
            )
            np.testing.assert_allclose(a2t.numpy(), 0.7 * s.T + 0.3 * transported, atol=1e-15)
            expected = realign_similarity(similarity, plan, 0.3, plan_scaling=plan_scaling)
            assert torch.equal(t2a, expected)

    def test_a_symmetric_plan_and_similarity_are_alike_to_all(self):
        similarity = (sample(2)[0] + sample(2)[0].T) / 2
        plan = sinkhorn_plan(similarity, iterations=2000)
        one, two, three = (
            realign_both_directions(similarity, plan, 0.5, a2t_realignment=kind)[1]
            for kind in ("transposed_plan", "transposed_result", "same_plan")
        )
        torch.testing.assert_close(one, three, rtol=0, atol=1e-9)
        assert not torch.allclose(one, two)  # Q S and S Q are not the same

    def test_unknown_kind(self):
        with pytest.raises(ValueError, match=r"`a2t_realignment` has to be one of .* but got 'plan'"):
            realign_both_directions(*sample(0), a2t_realignment="plan")
