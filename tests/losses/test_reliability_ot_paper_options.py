"""The paper's open points as options of `ReliabilityOTLoss`, each against the float64 reference."""

from itertools import product

import numpy as np
import ot
import pytest
import torch

from ask_lightning.functional import find_transport_solver
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from tests.helpers import reference
from tests.helpers.loss_cases import make_case, make_loss

FORMS = ["disagreement_factor", "agreement_factor", "disagreement_term", "agreement_term"]
ROW = {"plan_scaling": "row"}


def uniform(size: int) -> np.ndarray:
    return np.full(size, 1 / size)


class TestReliabilityForm:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("granularities", [("fine",), ("coarse",), ("fine", "coarse")])
    def test_value(self, form, granularities):
        case = make_case(seed=2)
        options = {"reliability_form": form, "granularities": granularities}
        np.testing.assert_allclose(case.loss(**options).item(), case.reference(**options).loss, rtol=1e-11)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("side", ["audio", "text"])
    def test_gradient(self, form, side):
        case = make_case(seed=3, batch=4, width=4, pairs=9)
        assert case.margin() > 1e-3
        point = getattr(case, side).requires_grad_()
        case.loss(reliability_form=form).backward()
        held = case.reference(reliability_form=form)

        def moved(values: np.ndarray) -> float:
            options = {"reliability_form": form, "held": held, "hold": ("rows", "plans")}
            return case.reference(**{side: values}, **options).loss

        expected = reference.gradient(moved, point.detach().numpy())
        np.testing.assert_allclose(point.grad.numpy(), expected, atol=1e-8)

    def test_all_forms_differ_and_are_one_without_reliability(self):
        case = make_case()
        assert len({round(case.loss(reliability_form=form).item(), 9) for form in FORMS}) == 4
        none = {"lambda_fine": 0.0, "lambda_coarse": 0.0}
        values = [case.loss(reliability_form=form, **none) for form in FORMS]
        torch.testing.assert_close(torch.stack(values), values[0].expand(4), rtol=1e-12, atol=0)

    def test_signs_lie_on_both_sides_of_no_reliability(self):
        case = make_case()
        none = case.loss(lambda_fine=0.0, lambda_coarse=0.0)
        for kind in ("factor", "term"):
            less, more = (case.loss(reliability_form=f"{sign}agreement_{kind}") for sign in ("dis", ""))
            torch.testing.assert_close(less + more, 2 * none, rtol=1e-12, atol=0)

    def test_terms_of_a_term(self):
        case = make_case()
        module = make_loss(reliability_form="agreement_term", lambda_fine=2.0, lambda_coarse=0.0)
        module(case.audio, case.text, knowledge=case.base)
        terms = module.last
        assert not [name for name in terms if name.startswith("factor")]
        for direction in ("t2a", "a2t"):
            expected = 2 * terms[f"psi_fine_{direction}"].log().mean()
            torch.testing.assert_close(terms[f"reliability_{direction}"], expected)
        whole = [terms[f"{part}_{to}"] for part in ("contrastive", "reliability") for to in ("t2a", "a2t")]
        torch.testing.assert_close(terms["loss"], sum(whole) / 2)

    def test_factors_of_given_potentials(self):
        psi = {("fine", "t2a"): torch.tensor([1.0, np.e]), ("coarse", "t2a"): torch.tensor([np.e, 1.0])}
        psi |= {(name, "a2t"): torch.ones(2) for name in ("fine", "coarse")}
        for form, sign in (("disagreement_factor", -1), ("agreement_factor", 1)):
            factors = make_loss(reliability_form=form).weighting.factors(psi)
            assert factors["t2a"].tolist() == pytest.approx([1 + 0.3 * sign, 1 + 0.2 * sign])
            assert factors["a2t"].tolist() == pytest.approx([1, 1])
        assert make_loss(reliability_form="agreement_term").weighting.factors(psi) == {}

    @pytest.mark.parametrize("form", ["agreement_term", "disagreement_term"])
    def test_options_that_say_nothing_about_a_term(self, form):
        with pytest.raises(ValueError, match=rf'`modulation` has to be "batch" .*{form}.* same mean'):
            ReliabilityOTLoss(reliability_form=form, modulation="sample")
        with pytest.raises(ValueError, match=rf"`modulation_gradient` has to be True .*{form}.*changes noth"):
            ReliabilityOTLoss(reliability_form=form, modulation_gradient=False)
        with pytest.raises(ValueError, match=r"`lambda_coarse` has to be at least 0, but got -1"):
            ReliabilityOTLoss(reliability_form=form, lambda_coarse=-1)
        assert ReliabilityOTLoss(reliability_form=form, lambda_fine=3, lambda_coarse=2).lambda_fine == 3

    def test_agreement_factor_has_the_limit_of_a_factor(self):
        with pytest.raises(ValueError, match="sum to less than 1"):
            ReliabilityOTLoss(reliability_form="agreement_factor", lambda_fine=0.9, lambda_coarse=0.2)


class TestAudioToTextRealignment:
    @pytest.mark.parametrize("kind", ["transposed_plan", "transposed_result", "same_plan"])
    @pytest.mark.parametrize("plan_scaling", ["marginal", "row"])
    def test_value(self, kind, plan_scaling):
        case = make_case(seed=4)
        options = {"a2t_realignment": kind, "plan_scaling": plan_scaling, "ot_factor": 0.7}
        np.testing.assert_allclose(case.loss(**options).item(), case.reference(**options).loss, rtol=1e-11)

    def test_only_audio_to_text_is_concerned(self):
        case = make_case()
        terms = {}
        for kind in ("transposed_plan", "transposed_result", "same_plan"):
            module = make_loss(a2t_realignment=kind, ot_factor=0.7, **ROW)
            module(case.audio, case.text, knowledge=case.base)
            terms[kind] = module.last
        assert len({float(each["contrastive_t2a"]) for each in terms.values()}) == 1
        assert len({round(float(each["contrastive_a2t"]), 9) for each in terms.values()}) == 3


class TestCoarseNeighbors:
    @pytest.mark.parametrize("number", [1, 2, 4, 5, 9])  # there are 5 prototypes
    def test_value(self, number):
        case = make_case(seed=5)
        options = {"num_coarse_neighbors": number}
        expected = case.reference(**options)
        np.testing.assert_allclose(case.loss(**options).item(), expected.loss, rtol=1e-11)
        assert expected.rows["coarse"][0].shape == (6, min(number, 5))
        assert expected.rows["fine"][0].shape == (6, 3)

    def test_more_than_pairs_for_the_fine_knowledge(self):
        assert make_case().loss(num_neighbors=3, num_coarse_neighbors=17, exclude_self=True).isfinite()

    def test_refused(self):
        with pytest.raises(ValueError, match=r"`num_coarse_neighbors` has to be an integer of at least 1"):
            ReliabilityOTLoss(num_coarse_neighbors=0)
        with pytest.raises(ValueError, match=r"`num_coarse_neighbors` is for the coarse .*got 3 with .*fine"):
            ReliabilityOTLoss(num_coarse_neighbors=3, granularities=("fine",))


class TestDistinctClips:
    @pytest.mark.parametrize(("number", "exclude_self"), list(product([1, 3, 8], [False, True])))
    def test_value(self, number, exclude_self):
        case = make_case(seed=6)  # 17 pairs of 9 clips
        options = {"num_neighbors": number, "distinct_clips": True, "exclude_self": exclude_self}
        expected = case.reference(**options)
        np.testing.assert_allclose(case.loss(**options).item(), expected.loss, rtol=1e-11)
        for rows in expected.rows["fine"]:
            assert all(len(set(case.base.ids[row].tolist())) == number for row in rows)

    def test_too_few_clips(self):
        message = r"`k` has to be in \[1, 9\] .* 17 pairs of 9 distinct clips, but got 10\."
        with pytest.raises(ValueError, match=message):
            make_case().loss(num_neighbors=10, distinct_clips=True)
        message = r"`k` has to be in \[1, 8\] .* 9 distinct clips without those of the own clip, but got 9\."
        with pytest.raises(ValueError, match=message):
            make_case().loss(num_neighbors=9, distinct_clips=True, exclude_self=True)

    def test_needs_ids(self):
        case = make_case()
        with pytest.raises(ValueError, match=r"`ids` has to be given"):
            make_loss(distinct_clips=True)(case.audio, case.text, knowledge=case.base)


class TestTransportSolver:
    EPSILON = 0.3

    @pytest.mark.parametrize(
        ("name", "plan"),
        [
            (
                "pot:sinkhorn_log",
                lambda s: reference.sinkhorn_plan(s, TestTransportSolver.EPSILON),
            ),
            ("pot:emd", lambda s: ot.emd(uniform(len(s)), uniform(len(s)), 1 - s)),
            (
                "pot:sinkhorn_unbalanced;reg_m=0.5;numItermax=2000;stopThr=1e-13",
                lambda s: unbalanced_plan(s, TestTransportSolver.EPSILON, 0.5),
            ),
            (
                "pot:partial_wasserstein;m=0.7",
                lambda s: ot.partial.partial_wasserstein(uniform(len(s)), uniform(len(s)), 1 - s, m=0.7),
            ),
        ],
        ids=["balanced", "exact", "unbalanced", "partial"],
    )
    def test_value(self, name, plan):
        case = make_case(seed=7)
        options = {"sinkhorn_epsilon": self.EPSILON, "ot_factor": 0.7, **ROW}
        loss = case.loss(transport_solver=name, sinkhorn_iterations=3000, **options)
        expected = case.reference(transport=plan, **options)
        np.testing.assert_allclose(loss.item(), expected.loss, rtol=1e-7)
        assert abs(expected.loss - case.reference(sinkhorn_iterations=1, **options).loss) > 1e-6

    def test_mass_is_logged(self):
        case = make_case()
        module = make_loss(transport_solver="pot:partial_wasserstein;m=0.7")
        module(case.audio, case.text, knowledge=case.base)
        for name in ("fine", "coarse"):
            assert module.last[f"plan_mass_{name}"].item() == pytest.approx(0.7)

    def test_options_bring_it_back(self):
        module = ReliabilityOTLoss(transport_solver="pot:sinkhorn_unbalanced;reg_m=1.0", distinct_clips=True)
        copy = ReliabilityOTLoss.from_options(module.options)
        assert copy.options == module.options
        assert copy.transport_solver == "pot:sinkhorn_unbalanced;reg_m=1.0"

    def test_no_gradient_through_the_plan(self):
        with pytest.raises(ValueError, match=r"`detach_plan` has to be True with transport_solver='pot:emd'"):
            ReliabilityOTLoss(transport_solver="pot:emd", detach_plan=False)


def unbalanced_plan(similarity: np.ndarray, epsilon: float, relaxation: float) -> np.ndarray:
    """The plan that minimises ⟨Q, 1 - S⟩ + ε KL(Q ‖ abᵀ) + ρ (KL(Q1 ‖ a) + KL(Qᵀ1 ‖ b)), by scaling."""
    marginal = uniform(len(similarity))
    kernel = np.outer(marginal, marginal) * np.exp((similarity - 1) / epsilon)
    rows, columns = np.ones(len(kernel)), np.ones(len(kernel))
    for _ in range(5000):
        rows = (marginal / (kernel @ columns)) ** (relaxation / (relaxation + epsilon))
        columns = (marginal / (kernel.T @ rows)) ** (relaxation / (relaxation + epsilon))
    return rows[:, None] * kernel * columns


def test_a_noisy_pair_is_left_out_by_unbalanced_transport():
    """The last text resembles no audio and the last audio no text: balanced transport has to pair them."""
    similarity = torch.full((5, 5), -0.9, dtype=torch.float64)
    similarity[:4, :4] = 0.9 * torch.eye(4, dtype=torch.float64)
    unbalanced = find_transport_solver("pot:sinkhorn_unbalanced;reg_m=0.1")(similarity, 0.1, 1000)
    balanced = find_transport_solver("sinkhorn")(similarity, 0.1, 1000)
    assert 5 * balanced[4].sum() == pytest.approx(1, abs=1e-2)
    assert unbalanced[4].sum() < 0.01 * unbalanced[0].sum()
