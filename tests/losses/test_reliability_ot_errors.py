"""Misuse of `ReliabilityOTLoss`: an error that names the argument, what it got and what is allowed."""

import re

import pytest
import torch

from ask_lightning.knowledge import KnowledgeBase, StoredPairs
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from tests.helpers.loss_cases import make_case, make_loss


class TestConstruction:
    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("num_neighbors", 0, "an integer of at least 1"),
            ("num_neighbors", -3, "an integer of at least 1"),
            ("num_neighbors", 2.5, "an integer of at least 1"),
            ("injection_ratio", -0.1, "in [0, 1]"),
            ("injection_ratio", 1.1, "in [0, 1]"),
            ("ot_factor", -0.1, "in [0, 1]"),
            ("ot_factor", 1.1, "in [0, 1]"),
            ("temperature", 0.0, "positive"),
            ("temperature", -0.07, "positive"),
            ("sinkhorn_epsilon", 0.0, "positive"),
            ("sinkhorn_epsilon", float("nan"), "positive"),
            ("sinkhorn_iterations", 0, "an integer of at least 1"),
            ("sinkhorn_iterations", 2.5, "an integer of at least 1"),
            ("injection_ratio", float("nan"), "in [0, 1]"),
            ("ot_factor", float("nan"), "in [0, 1]"),
            ("temperature", float("nan"), "positive"),
        ],
    )
    def test_number_out_of_range(self, name, value, allowed):
        message = f"Argument `{name}` has to be {allowed}, but got {value}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ReliabilityOTLoss(**{name: value})

    @pytest.mark.parametrize(
        ("name", "allowed"),
        [
            ("plan_scaling", "('marginal', 'row')"),
            ("positives", "('diagonal', 'ids')"),
            ("modulation", "('batch', 'sample')"),
        ],
    )
    @pytest.mark.parametrize("value", ["other", "", None])
    def test_unknown_choice(self, name, allowed, value):
        message = f"Argument `{name}` has to be one of {allowed}, but got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ReliabilityOTLoss(**{name: value})

    @pytest.mark.parametrize("granularities", [(), ("medium",), ("fine", "medium"), "fine"])
    def test_unknown_granularity(self, granularities):
        message = r"Argument `granularities` has to name one or both of \('fine', 'coarse'\), but got"
        with pytest.raises(ValueError, match=message):
            ReliabilityOTLoss(granularities=granularities)

    @pytest.mark.parametrize(
        ("lambda_fine", "lambda_coarse"),
        [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.9, 0.3), (-0.1, 0.2), (0.2, -0.1), (float("nan"), 0.1)],
    )
    def test_modulation_that_could_turn_negative(self, lambda_fine, lambda_coarse):
        message = (
            "Arguments `lambda_fine` and `lambda_coarse` have to be at least 0 and sum to less than 1, "
            f"but got {lambda_fine} and {lambda_coarse}"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            ReliabilityOTLoss(lambda_fine=lambda_fine, lambda_coarse=lambda_coarse)

    def test_extremes_that_are_allowed(self):
        for options in (
            {"injection_ratio": 0, "ot_factor": 0, "lambda_fine": 0, "lambda_coarse": 0},
            {"injection_ratio": 1, "ot_factor": 1, "lambda_fine": 0.99, "lambda_coarse": 0},
            {"num_neighbors": 1, "sinkhorn_iterations": 1},
        ):
            case = make_case()
            assert case.loss(**options).isfinite()


class TestBatch:
    @pytest.mark.parametrize(
        ("audio", "text"),
        [((4, 5), (4, 6)), ((4, 5), (3, 5)), ((4, 2, 5), (4, 2, 5)), ((5,), (5,)), ((4, 5), (4, 1, 5))],
    )
    def test_shapes_that_are_not_two_equal_matrices(self, audio, text):
        message = (
            "Arguments `audio` and `text` have to be of the same shape (batch, width), "
            f"but got {audio} and {text}."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            make_loss()(torch.ones(audio), torch.ones(text), knowledge=make_case().base)

    @pytest.mark.parametrize("batch", [0, 1])
    def test_batch_with_nothing_to_contrast(self, batch):
        shape = (batch, 5)
        message = f"A batch has to hold at least 2 pairs to contrast, but got audio {shape} and text {shape}."
        with pytest.raises(ValueError, match=re.escape(message)):
            make_loss()(torch.ones(shape), torch.ones(shape), knowledge=make_case().base)

    @pytest.mark.parametrize("option", [{"positives": "ids"}, {"exclude_self": True}])
    def test_ids_missing(self, option):
        case = make_case()
        with pytest.raises(ValueError, match=r"Argument `ids` has to be given, because .*pass `ids=`"):
            make_loss(**option)(case.audio, case.text, knowledge=case.base)

    @pytest.mark.parametrize("option", [{}, {"positives": "ids"}, {"exclude_self": True}])
    def test_ids_of_another_number(self, option):
        case = make_case()
        message = r"Argument `ids` has to hold one id for each of the 6 pairs, but got 5\."
        with pytest.raises(ValueError, match=message):
            make_loss(**option)(case.audio, case.text, ids=case.ids[:5], knowledge=case.base)

    @pytest.mark.parametrize(
        ("ids", "got"), [(torch.arange(6.0), "torch.float32"), ([0.5] * 6, "0.5"), (["a", None] * 3, "None")]
    )
    def test_ids_that_are_not_identifiers(self, ids, got):
        case = make_case()
        with pytest.raises(ValueError, match=rf"Argument `ids` has to .*integers.* got {got}"):
            make_loss(positives="ids")(case.audio, case.text, ids=ids, knowledge=case.base)


class TestKnowledge:
    def test_missing_while_training(self):
        case = make_case()
        with pytest.raises(
            RuntimeError, match=r"no knowledge .*KnowledgeRefreshCallback.*`loss\.knowledge = "
        ):
            make_loss().train()(case.audio, case.text)

    def test_of_another_width(self):
        case, wider = make_case(), make_case(width=7)
        message = r"embeddings of width 7, but was asked with audio \(6, 5\) and text \(6, 5\)"
        with pytest.raises(ValueError, match=message):
            make_loss()(case.audio, case.text, knowledge=wider.base)

    @pytest.mark.parametrize("granularities", [("fine",), ("fine", "coarse")])
    def test_with_fewer_pairs_than_neighbors(self, granularities):
        message = r"Argument `k` has to be in \[1, 17\] for a knowledge base of 17 pairs, but got 18\."
        with pytest.raises(ValueError, match=message):
            make_case().loss(num_neighbors=18, granularities=granularities)
        assert make_case().loss(num_neighbors=17, granularities=granularities).isfinite()

    def test_with_fewer_pairs_of_other_clips_than_neighbors(self):
        message = (
            r"`k` has to be in \[1, 15\] .*without those of the own clip.* but got 16\..*`num_neighbors`"
        )
        with pytest.raises(ValueError, match=message):
            make_case().loss(num_neighbors=16, exclude_self=True)
        assert make_case().loss(num_neighbors=15, exclude_self=True).isfinite()

    @pytest.mark.parametrize("modulation", ["batch", "sample"])
    def test_so_long_that_the_factor_is_not_positive(self, modulation):
        case = make_case()
        long = 20 * case.base.fine.audio[:4]
        case.base = KnowledgeBase(case.base.fine, StoredPairs(long, long), case.base.ids)
        message = (
            r"modulation factor of direction \w+ fell to -.*`normalize_prototypes=True`, or lower "
            r"`lambda_fine` \(0\.2\) and `lambda_coarse` \(0\.3\)"
        )
        with pytest.raises(ValueError, match=message):
            case.loss(modulation=modulation)
