"""`sinkhorn_plan`, Eq. 15 and 36: against POT, against the reference, and its properties."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from ask_lightning.functional import sinkhorn_plan, transport, unit_length
from tests.helpers import reference

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
HALVES = [torch.bfloat16, torch.float16]
# The exponential domain, the log domain of a small ε, and the log domain by choice.
DOMAINS = [(0.1, True), (0.01, True), (0.1, False)]


def cosines(seed: int, rows: int, columns: int | None = None, dtype=torch.float64) -> torch.Tensor:
    """Similarities of an untrained model, near which Sinkhorn's iteration converges within the test."""
    columns = columns or rows
    generator = torch.Generator().manual_seed(seed)
    text, audio = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return (unit_length(text) @ unit_length(audio).T).to(dtype)


def trained(seed: int, batch: int) -> torch.Tensor:
    """Similarities of a trained model: the pairs on the diagonal agree. The iteration is far slower."""
    generator = torch.Generator().manual_seed(seed)
    text, noise = torch.randn(2, batch, 16, generator=generator, dtype=torch.float64)
    return unit_length(text) @ unit_length(text + noise).T


def uniform(seed: int, rows: int, columns: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(rows, columns or rows, generator=generator, dtype=torch.float64) - 1


def pot_plan(similarity: torch.Tensor, epsilon: float, method: str = "sinkhorn") -> np.ndarray:
    """POT's plan in float64; it minimises a cost where ours maximises a similarity."""
    rows, columns = similarity.shape
    plan, log = ot.sinkhorn(
        np.full(rows, 1 / rows),
        np.full(columns, 1 / columns),
        1 - similarity.double().numpy(),
        epsilon,
        method=method,
        numItermax=20_000,
        stopThr=1e-10,
        log=True,
    )
    assert log["err"][-1] < 1e-10, "POT did not converge"
    return plan


def assert_close_to_largest(plan: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(plan.double().numpy(), expected, rtol=0, atol=tolerance * expected.max())


class TestAgreement:
    @pytest.mark.parametrize("batch", [2, 32, 512])
    @pytest.mark.parametrize("epsilon", [0.03, 0.1, 1.0])
    def test_exponential_domain_with_pot(self, epsilon, batch):
        similarity = cosines(0, batch, dtype=torch.float32)
        plan = sinkhorn_plan(similarity, epsilon, iterations=1000)
        assert plan.dtype == torch.float32
        assert_close_to_largest(plan, pot_plan(similarity, epsilon), 1e-5)

    @pytest.mark.parametrize(("batch", "epsilon"), [(2, 0.015), (2, 0.029), (32, 0.02), (64, 0.025)])
    def test_log_domain_of_a_small_epsilon_with_pot(self, epsilon, batch):
        similarity = cosines(1, batch, dtype=torch.float32)
        plan = sinkhorn_plan(similarity, epsilon, iterations=500)
        assert_close_to_largest(plan, pot_plan(similarity, epsilon), 1e-5)

    @pytest.mark.parametrize(("batch", "epsilon"), [(2, 0.03), (32, 0.1), (64, 1.0)])
    def test_log_domain_by_choice_with_pot(self, epsilon, batch):
        similarity = cosines(0, batch, dtype=torch.float32)
        plan = sinkhorn_plan(similarity, epsilon, iterations=300, bounded=False)
        assert_close_to_largest(plan, pot_plan(similarity, epsilon), 1e-5)

    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # inside POT
    def test_unbounded_similarities_with_pot(self):
        # A spread of 1000 ε, mostly by the offset of one row, which no exponential survives.
        similarity = 5 * cosines(0, 6)
        similarity[2] -= 500
        plan = sinkhorn_plan(similarity, 0.5, iterations=1000, bounded=False)
        assert_close_to_largest(plan, pot_plan(similarity, 0.5, "sinkhorn_log"), 1e-8)

    @pytest.mark.parametrize("shape", [(5, 5), (3, 4), (4, 3), (2, 32), (32, 2)])
    @pytest.mark.parametrize(("epsilon", "bounded"), [(0.1, True), (0.025, True), (0.1, False)])
    def test_rectangles_with_pot(self, epsilon, bounded, shape):
        similarity = cosines(0, *shape, dtype=torch.float32)
        plan = sinkhorn_plan(similarity, epsilon, iterations=1000, bounded=bounded)
        assert_close_to_largest(plan, pot_plan(similarity, epsilon), 1e-5)

    @pytest.mark.parametrize("shape", [(6, 6), (3, 5)])
    @pytest.mark.parametrize("epsilon", [0.03, 0.1, 1.0])
    def test_reference_with_pot(self, epsilon, shape):
        similarity = cosines(2, *shape)
        expected = reference.sinkhorn_plan(similarity.numpy(), epsilon)
        np.testing.assert_allclose(pot_plan(similarity, epsilon), expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("iterations", [1, 2, 5, 50])
    @pytest.mark.parametrize("make", [cosines, trained, uniform])
    @pytest.mark.parametrize(("epsilon", "bounded"), [*DOMAINS, (0.03, True), (1.0, True), (2.0, False)])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
    def test_every_iteration_with_reference(self, dtype, tolerance, epsilon, bounded, make, iterations):
        similarity = make(0, 7)
        plan = sinkhorn_plan(similarity.to(dtype), epsilon, iterations, bounded=bounded)
        assert plan.dtype == dtype
        expected = reference.sinkhorn_plan(similarity.numpy(), epsilon, iterations)
        assert_close_to_largest(plan, expected, tolerance)

    @pytest.mark.parametrize("iterations", [1, 2, 50, 500])
    @pytest.mark.parametrize("shape", [(1, 6), (3, 7), (7, 3)])
    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_every_iteration_of_a_rectangle_with_reference(self, epsilon, bounded, shape, iterations):
        similarity = uniform(0, *shape)
        plan = sinkhorn_plan(similarity.float(), epsilon, iterations, bounded=bounded)
        expected = reference.sinkhorn_plan(similarity.numpy(), epsilon, iterations)
        assert_close_to_largest(plan, expected, 2e-5)

    def test_defaults(self):
        similarity = cosines(0, 8)
        assert torch.equal(sinkhorn_plan(similarity), sinkhorn_plan(similarity, 0.1, 50, bounded=True))


class TestProperties:
    @PROPERTY
    @given(
        seed=st.integers(0, 10_000),
        batch=st.integers(1, 40),
        epsilon=st.floats(0.03, 5),
        iterations=st.integers(1, 60),
    )
    @pytest.mark.parametrize("bounded", [True, False])
    def test_mass_is_one_and_columns_are_exact(self, bounded, seed, batch, epsilon, iterations):
        plan = sinkhorn_plan(uniform(seed, batch).float(), epsilon, iterations, bounded=bounded)
        assert (plan >= 0).all()
        assert plan.sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(plan.sum(0), torch.full((batch,), 1 / batch), rtol=1e-5, atol=0)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 40), epsilon=st.floats(0.1, 5))
    @pytest.mark.parametrize("bounded", [True, False])
    def test_rows_converge(self, bounded, seed, batch, epsilon):
        plan = sinkhorn_plan(cosines(seed, batch), epsilon, 400, bounded=bounded)
        expected = torch.full((batch,), 1 / batch, dtype=torch.float64)
        torch.testing.assert_close(plan.sum(1), expected, rtol=1e-6, atol=0)

    @PROPERTY
    @given(
        seed=st.integers(0, 10_000),
        rows=st.integers(1, 40),
        columns=st.integers(1, 40),
        iterations=st.sampled_from([1, 50, 500]),
    )
    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_marginals_of_rectangles(self, epsilon, bounded, seed, rows, columns, iterations):
        plan = sinkhorn_plan(uniform(seed, rows, columns).float(), epsilon, iterations, bounded=bounded)
        torch.testing.assert_close(plan.sum(0), torch.full((columns,), 1 / columns), rtol=3e-5, atol=0)
        assert plan.sum().item() == pytest.approx(1, abs=3e-5)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(2, 12))
    @pytest.mark.parametrize("bounded", [True, False])
    def test_optimal_among_plans_of_the_same_marginals(self, bounded, seed, batch):
        similarity, epsilon = uniform(seed, batch).numpy(), 0.3
        plan = sinkhorn_plan(torch.from_numpy(similarity), epsilon, 500, bounded=bounded).numpy()

        def objective(q):
            return (q * similarity).sum() - epsilon * (q * np.log(q)).sum()

        # Moving mass around a 2 × 2 minor keeps both marginals.
        random = np.random.default_rng(seed)
        (i, k), (j, m) = random.choice(batch, 2, replace=False), random.choice(batch, 2, replace=False)
        direction = np.zeros_like(plan)
        direction[i, j] = direction[k, m] = 1
        direction[i, m] = direction[k, j] = -1
        step = 0.5 * plan[np.ix_([i, k], [j, m])].min()
        assert objective(plan) >= objective(plan + step * direction) - 1e-12
        slope = (objective(plan + 1e-3 * step * direction) - objective(plan)) / (1e-3 * step)
        assert abs(slope) < 1e-2

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 20))
    @pytest.mark.parametrize(("epsilon", "bounded"), [(1.0, True), (1.0, False)])
    def test_symmetric_for_symmetric_similarity(self, epsilon, bounded, seed, batch):
        similarity = uniform(seed, batch)
        plan = sinkhorn_plan((similarity + similarity.T) / 2, epsilon, 200, bounded=bounded)
        torch.testing.assert_close(plan, plan.T, rtol=0, atol=1e-9)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 20))
    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_permuting_rows_and_columns_permutes_plan(self, epsilon, bounded, seed, batch):
        similarity = uniform(seed, batch)
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.randperm(batch, generator=generator), torch.randperm(batch, generator=generator)
        expected = sinkhorn_plan(similarity, epsilon, bounded=bounded)[rows][:, columns]
        permuted = sinkhorn_plan(similarity[rows][:, columns], epsilon, bounded=bounded)
        torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-11)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 20))
    @pytest.mark.parametrize(("epsilon", "bounded"), [(1.0, True), (1.0, False)])
    def test_transpose_once_converged(self, epsilon, bounded, seed, batch):
        plan = sinkhorn_plan(uniform(seed, batch), epsilon, 200, bounded=bounded)
        transposed = sinkhorn_plan(uniform(seed, batch).T, epsilon, 200, bounded=bounded)
        torch.testing.assert_close(transposed, plan.T, rtol=0, atol=1e-9)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 20))
    def test_offsets_of_rows_and_columns_are_immaterial(self, seed, batch):
        similarity, offsets = uniform(seed, batch), uniform(seed + 1, 2, batch)
        plan = sinkhorn_plan(similarity, 1.0, 200)
        shifted = sinkhorn_plan(similarity + offsets[0, :, None] + offsets[1], 1.0, 200, bounded=False)
        torch.testing.assert_close(shifted, plan, rtol=0, atol=1e-9)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 40))
    @pytest.mark.parametrize("bounded", [True, False])
    def test_uniform_for_large_epsilon(self, bounded, seed, batch):
        plan = sinkhorn_plan(uniform(seed, batch), 1e5, bounded=bounded)
        expected = torch.full_like(plan, 1 / batch**2)
        torch.testing.assert_close(plan, expected, rtol=1e-4, atol=0)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 8))
    @pytest.mark.parametrize(("epsilon", "bounded"), [(0.03, True), (0.01, True), (0.01, False)])
    def test_best_assignment_for_small_epsilon(self, epsilon, bounded, seed, batch):
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
        similarity = 0.2 * uniform(seed, batch) + 0.8 * torch.eye(batch, dtype=torch.float64)[order]
        plan = sinkhorn_plan(similarity.float(), epsilon, bounded=bounded).numpy()
        rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
        expected = np.zeros((batch, batch))
        expected[rows, columns] = 1 / batch
        np.testing.assert_allclose(plan, expected, rtol=0, atol=1e-5)

    @PROPERTY
    @given(seed=st.integers(0, 10_000), batch=st.integers(1, 64), epsilon=st.floats(0.03, 1))
    def test_extreme_similarities_stay_finite_in_float32(self, seed, batch, epsilon):
        similarity = uniform(seed, batch).sign().float()
        plan = sinkhorn_plan(similarity, epsilon)
        assert plan.isfinite().all()
        assert plan.sum().item() == pytest.approx(1, abs=1e-5)


class TestWays:
    """The ways by which sizes and devices are served give the same plan."""

    @pytest.mark.parametrize("shape", [(8, 8), (3, 5), (2, 4, 4), (2, 1, 3, 5)])
    def test_exponential_domain_of_a_gpu(self, shape):
        similarity = cosines(0, 24, 25).flatten()[: torch.Size(shape).numel()].reshape(shape)
        plan = transport._exponential_domain(similarity, 0.1, 50)
        torch.testing.assert_close(plan, sinkhorn_plan(similarity), rtol=1e-11, atol=0)

    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_several_problems_at_once(self, requires_grad, epsilon, bounded):
        problems = torch.stack([cosines(seed, 4, 5) for seed in range(6)]).reshape(2, 3, 4, 5)
        plans = sinkhorn_plan(problems.requires_grad_(requires_grad), epsilon, bounded=bounded)
        for row, of_row in zip(problems, plans, strict=True):
            for problem, plan in zip(row, of_row, strict=True):
                torch.testing.assert_close(plan, sinkhorn_plan(problem, epsilon, bounded=bounded))

    def test_transposed_matrix(self):
        similarity = cosines(0, 6, 8, dtype=torch.float32)
        torch.testing.assert_close(sinkhorn_plan(similarity.T), sinkhorn_plan(similarity.T.contiguous()))

    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8)])
    def test_operator_of_a_compiled_function_has_the_layout_that_the_compiler_expects(self, shape, transpose):
        similarity = cosines(0, 12, 8, dtype=torch.float32)[: np.prod(shape[:-1])].reshape(shape)
        similarity = similarity.mT if transpose else similarity
        torch.library.opcheck(transport._operator, (similarity, 0.1, 5))
        plan = transport._operator(similarity, 0.1, 5)
        with FakeTensorMode() as mode:
            expected = transport._operator(mode.from_tensor(similarity), 0.1, 5)
        assert plan.stride() == expected.stride()
        torch.testing.assert_close(plan, sinkhorn_plan(similarity, 0.1, 5))

    @pytest.mark.parametrize("make", [cosines, trained, uniform])
    def test_domains_agree_at_their_border(self, make):
        similarity = make(0, 32).float()
        border = transport._SMALLEST_EXPONENTIAL_EPSILON
        exponential, log = (sinkhorn_plan(similarity, border * share) for share in (1, 1 - 1e-6))
        by_choice = sinkhorn_plan(similarity, border, bounded=False)
        for plan in (log, by_choice):
            assert_close_to_largest(plan, exponential.double().numpy(), 1e-4)

    def test_gradients_agree_at_the_border(self):
        similarity = cosines(0, 8).requires_grad_()
        border = transport._SMALLEST_EXPONENTIAL_EPSILON
        gradients = []
        for epsilon, bounded in ((border, True), (border * (1 - 1e-6), True), (border, False)):
            plan = sinkhorn_plan(similarity, epsilon, bounded=bounded)
            gradients += torch.autograd.grad(plan.square().sum(), similarity)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(gradients[2], gradients[0])


class TestPrecision:
    @pytest.mark.parametrize("half", HALVES)
    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_half_precision_under_autocast_gives_the_float32_plan(
        self, epsilon, bounded, requires_grad, half
    ):
        similarity = cosines(0, 32).to(half)
        expected = sinkhorn_plan(similarity.float().requires_grad_(requires_grad), epsilon, bounded=bounded)
        similarity.requires_grad_(requires_grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plan = sinkhorn_plan(similarity, epsilon, bounded=bounded)
        assert plan.dtype == torch.float32
        assert torch.equal(plan, expected)
        assert torch.equal(sinkhorn_plan(similarity, epsilon, bounded=bounded), expected)
        if requires_grad:
            plan.square().sum().backward()
            assert similarity.grad.dtype == half
            assert similarity.grad.isfinite().all()

    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_float32_under_autocast_is_untouched(self, epsilon, bounded):
        similarity = cosines(0, 32, dtype=torch.float32)
        expected = sinkhorn_plan(similarity, epsilon, bounded=bounded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sinkhorn_plan(similarity, epsilon, bounded=bounded), expected)

    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_argument_is_left_as_it_was(self, epsilon, bounded):
        similarity = cosines(0, 8)
        before = similarity.clone()
        sinkhorn_plan(similarity, epsilon, bounded=bounded)
        assert torch.equal(similarity, before)


class TestGradient:
    @pytest.mark.parametrize("shape", [(4, 4), (3, 5)])
    @pytest.mark.parametrize("iterations", [1, 20])
    @pytest.mark.parametrize(("epsilon", "bounded"), [*DOMAINS, (0.03, True), (1.0, True)])
    def test_gradcheck(self, epsilon, bounded, iterations, shape):
        similarity = cosines(3, *shape).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda s: sinkhorn_plan(s, epsilon, iterations, bounded=bounded), similarity, eps=1e-6, atol=1e-5
        )

    @pytest.mark.parametrize(("epsilon", "bounded"), DOMAINS)
    def test_plan_is_the_same_with_and_without_a_graph(self, epsilon, bounded):
        similarity = cosines(0, 33, dtype=torch.float32)
        plan = sinkhorn_plan(similarity, epsilon, bounded=bounded)
        assert not plan.requires_grad
        similarity.requires_grad_()
        with_graph = sinkhorn_plan(similarity, epsilon, bounded=bounded)
        assert with_graph.requires_grad
        torch.testing.assert_close(with_graph, plan, rtol=1e-5, atol=1e-8)
        with torch.no_grad():
            assert torch.equal(sinkhorn_plan(similarity, epsilon, bounded=bounded), plan)
        with torch.inference_mode():
            assert torch.equal(sinkhorn_plan(similarity, epsilon, bounded=bounded), plan)

    @pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.05, 0.1, 1.0])
    @pytest.mark.parametrize("nearest_to_nothing", [0.0, -0.9])
    def test_finite_and_right_in_float32_when_a_column_resembles_no_row(self, nearest_to_nothing, epsilon):
        similarity = (0.9 + 0.1 * uniform(0, 4)).float()
        similarity[:, 1] = nearest_to_nothing
        weights = uniform(1, 4)

        def gradient_of(s):
            s = s.clone().requires_grad_()
            (sinkhorn_plan(s, epsilon, bounded=s.dtype == torch.float32) * weights).sum().backward()
            return s.grad.double()

        expected = gradient_of(similarity.double())
        torch.testing.assert_close(gradient_of(similarity), expected, rtol=1e-3, atol=1e-4)


class TestErrors:
    @pytest.mark.parametrize("epsilon", [0, 0.0, -0.1, float("nan")])
    def test_epsilon_that_is_not_positive(self, epsilon):
        with pytest.raises(ValueError, match=rf"Argument `epsilon` has to be positive, but got {epsilon}\."):
            sinkhorn_plan(torch.eye(3), epsilon)

    @pytest.mark.parametrize("iterations", [0, -5])
    def test_iterations_below_one(self, iterations):
        message = rf"Argument `iterations` has to be an integer of at least 1, but got {iterations}\."
        with pytest.raises(ValueError, match=message):
            sinkhorn_plan(torch.eye(3), iterations=iterations)
