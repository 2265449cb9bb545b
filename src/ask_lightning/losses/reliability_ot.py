"""`ReliabilityOTLoss`: Eq. 9–19 of the paper as one module.

Axes: `B` batch, `K` neighbours, `d` width. "t2a" is text-to-audio: rows are texts, columns audios.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import get_args
from warnings import warn

import torch
from torch import Tensor

from ask_lightning.functional import (
    find_transport_solver,
    inject_knowledge,
    nt_xent,
    realign_both_directions,
    realign_similarity,
)
from ask_lightning.functional.distillation import Teacher
from ask_lightning.functional.entropy import row_entropy
from ask_lightning.functional.reliability import ReliabilityForm
from ask_lightning.functional.transport import A2TRealignment, PlanScaling
from ask_lightning.functional.transport_solvers import SINKHORN
from ask_lightning.interaction import Embeddings, Similarities, TokenEmbeddings, pooled
from ask_lightning.knowledge.base import GRANULARITIES, GranularityName, KnowledgeBase
from ask_lightning.knowledge.pairs import Neighborhood, PairStore
from ask_lightning.losses.base import Positives, Temperature
from ask_lightning.losses.interacting import InteractingLoss, InteractionLike
from ask_lightning.losses.reliability_weighting import DIRECTIONS, Modulation, ReliabilityWeighting
from ask_lightning.losses.teacher import BatchTargets, StoredTeacher
from ask_lightning.utilities.arguments import check_choice, check_count, check_positive, check_range
from ask_lightning.utilities.deferred_check import DeferredCheck


class ReliabilityOTLoss(InteractingLoss):
    """The ASK loss: knowledge injection, optimal-transport realignment, reliability weighting.

    For each granularity the batch's embeddings are mixed with the knowledge that they retrieve (Eq. 9), the
    similarities of the mixed embeddings are realigned by a transport plan (Eq. 15), and their
    cross-entropy is weighed by how far the audio's and the text's neighbours agree (Eq. 11–13, 16–19):

        L = ½ Σ_direction (1 + λ_f F_f + λ_c F_c) (CE(S*_f / τ) + CE(S*_c / τ))

    References:
        ASK, arXiv 2512.19703 version 2.

    Requirements:
        A `KnowledgeBase`, either passed to each call or kept in `loss.knowledge`, where
        `KnowledgeRefreshCallback` puts it. Without one the loss raises while training; in evaluation
        mode (a sanity check before the first base) it is computed without knowledge and transport.

    Recommendations:
        With the paper's `plan_scaling="marginal"` the realigned similarity is close to (1 - β) S, that
        is, a higher temperature: when you compare it with another loss, tune that loss's temperature, too.
        With an in-domain source the nearest neighbour of a sample is its own older embedding;
        `exclude_self=True` shows how much of a gain comes from there.

    Args:
        num_neighbors: K ≥ 1, the number of neighbours per query and granularity.
        injection_ratio: ρ in [0, 1], the share of knowledge in the injected embedding. 0 switches it off.
        ot_factor: β in [0, 1], the share of the transport plan in the realignment. 0 switches it off.
        lambda_fine: λ_f ≥ 0, the weight of the fine reliability. λ_f + λ_c < 1, so that the factor stays
            positive; a negative one would train the model away from its pairs. (The terms of
            `reliability_form` have no such limit.)
        lambda_coarse: λ_c ≥ 0, the weight of the coarse reliability.
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, such as a
            learnable parameter or a property, a callable `(model)` that returns τ, or the parameter itself.
            A loss without a wrapper also takes a callable without arguments.
        sinkhorn_epsilon: ε > 0, the weight of the transport plan's entropy.
        sinkhorn_iterations: Number of updates of the plan, at least 1.
        granularities: The granularities that take part: `"fine"`, `"coarse"` or both.
        num_coarse_neighbors: K ≥ 1 of the coarse knowledge, all prototypes if there are fewer. Default:
            `num_neighbors`.
        renormalize_injected: Whether to bring injected embeddings back to unit length.
        plan_scaling: `"marginal"` (the paper: rows of the plan sum to 1/B) or `"row"` (rows sum to 1).
        a2t_realignment: What the audio-to-text direction makes of the plan: `"transposed_plan"`,
            `"transposed_result"` or `"same_plan"`, see `functional.realign_both_directions`.
        transport_solver: `"sinkhorn"`, or `"pot:NAME"` for the solver NAME of POT, with further parameters
            behind semicolons, see `functional.find_transport_solver`: unbalanced and partial transport leave
            out pairs that do not match. It needs the extra `pot` and a plan that is detached. ε is POT's
            `reg`, and acts only where the solver has one.
        detach_plan: Whether the plan is constant in the backward pass.
        exclude_self: Whether to leave out knowledge rows of the query's own clip; needs ids.
        distinct_clips: Whether the fine neighbours of a query are of K different clips, each by the row of it
            that comes first; needs ids. Otherwise five captions of a clip are five rows with one audio.
        positives: `"diagonal"` (the paper), or `"ids"`: other captions of the same clip are left out of the
            denominator; needs ids.
        reliability_form: How the reliability enters the loss. `"disagreement_factor"`: the cross-entropy is
            multiplied by 1 + Σ λ F with F = -log Ψ (Eq. 17–18). `"agreement_factor"`: the same with
            F = log Ψ. `"agreement_term"`: Σ λ log Ψ is added to the cross-entropy of each sample (Eq. 21 and
            33–34). `"disagreement_term"`: -Σ λ log Ψ is added.
        modulation: `"batch"`: the loss of the batch is weighed by the mean reliability (the paper);
            `"sample"`: the loss of each sample by its own. It is for the factors: of a term that is added,
            the mean over the batch is the same.
        modulation_gradient: Whether to differentiate the factor as well.
        interaction: How texts and audios are compared: None is the dot product of pooled embeddings; others
            are the name of the model's attribute that is an `Interaction`, the interaction itself, or another
            callable `(text, audio)` that returns `Similarities` or one matrix `(B, B)` with texts as rows.
            It compares the injected embeddings; tokens all get the knowledge that their pooled embedding
            retrieved. If its two directions differ, each has a plan of its own.
        gather: `True`: contrast, transport and reliability are computed over the batches of all ranks, which
            may be of different sizes, with gradients to every rank; under DDP the gradient is that of one
            process with the whole batch. `False`: they are computed over the local batch.
        distillation_weight: α in [0, 1], the share of stored knowledge in the targets of the contrast, see
            `KnowledgeDistillationLoss`; above 0 it needs ids. The paper has 0.
        teacher_temperature: τ_t > 0, the temperature of these targets.
        teacher: `"softmax"` or `"transport"`, how these targets are made.

    Attributes:
        knowledge: The `KnowledgeBase` in use, or `None`.
        last: Detached terms of the last call, by name; see the table in docs/logging.md.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> audio, text = torch.randn(2, 100, 16, generator=generator)
        >>> loss = ReliabilityOTLoss(num_neighbors=5)
        >>> loss.knowledge = KnowledgeBase.from_embeddings(audio, text, num_prototypes=8)
        >>> loss(audio[:32], text[:32]).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_neighbors: int = 10,
        injection_ratio: float = 0.2,
        ot_factor: float = 0.2,
        lambda_fine: float = 0.2,
        lambda_coarse: float = 0.3,
        temperature: Temperature = 0.07,
        sinkhorn_epsilon: float = 0.1,
        sinkhorn_iterations: int = 50,
        *,
        granularities: Sequence[GranularityName] = GRANULARITIES,
        num_coarse_neighbors: int | None = None,
        renormalize_injected: bool = False,
        plan_scaling: PlanScaling = "marginal",
        a2t_realignment: A2TRealignment = "transposed_plan",
        transport_solver: str = SINKHORN,
        detach_plan: bool = True,
        exclude_self: bool = False,
        distinct_clips: bool = False,
        positives: Positives = "diagonal",
        reliability_form: ReliabilityForm = "disagreement_factor",
        modulation: Modulation = "batch",
        modulation_gradient: bool = True,
        interaction: InteractionLike | str | None = None,
        gather: bool = False,
        distillation_weight: float = 0.0,
        teacher_temperature: float = 0.1,
        teacher: Teacher = "softmax",
    ) -> None:
        super().__init__(temperature, positives=positives, interaction=interaction, gather=gather)
        check_count("num_neighbors", num_neighbors)
        check_count("sinkhorn_iterations", sinkhorn_iterations)
        check_range("injection_ratio", injection_ratio, 0, 1)
        check_range("ot_factor", ot_factor, 0, 1)
        check_positive("sinkhorn_epsilon", sinkhorn_epsilon)
        check_choice("plan_scaling", plan_scaling, get_args(PlanScaling))
        check_choice("a2t_realignment", a2t_realignment, get_args(A2TRealignment))
        if not granularities or not set(granularities) <= set(GRANULARITIES):
            raise ValueError(
                f"Argument `granularities` has to name one or both of {GRANULARITIES}, "
                f"but got {tuple(granularities)}."
            )
        if num_coarse_neighbors is not None:
            check_count("num_coarse_neighbors", num_coarse_neighbors)
            if "coarse" not in granularities:
                raise ValueError(
                    f"Argument `num_coarse_neighbors` is for the coarse granularity, but got "
                    f"{num_coarse_neighbors} with granularities={tuple(granularities)}. Leave it out."
                )
        if transport_solver != SINKHORN and not detach_plan:
            raise ValueError(
                f"Argument `detach_plan` has to be True with transport_solver={transport_solver!r}, whose "
                'plan has no gradient. Use "sinkhorn" to differentiate through the plan.'
            )
        self.num_neighbors = num_neighbors
        self.num_coarse_neighbors = num_coarse_neighbors
        # NumPy numbers would make checkpoints that `weights_only=True` refuses.
        self.injection_ratio = float(injection_ratio)
        self.ot_factor = float(ot_factor)
        self.lambda_fine = float(lambda_fine)
        self.lambda_coarse = float(lambda_coarse)
        self.sinkhorn_epsilon = float(sinkhorn_epsilon)
        self.sinkhorn_iterations = sinkhorn_iterations
        self.granularities = tuple(name for name in GRANULARITIES if name in granularities)
        self.renormalize_injected = renormalize_injected
        self.plan_scaling: PlanScaling = plan_scaling
        self.a2t_realignment: A2TRealignment = a2t_realignment
        self.transport_solver = transport_solver
        self._solve_transport = find_transport_solver(transport_solver)
        self.detach_plan = detach_plan
        self.exclude_self = exclude_self
        self.distinct_clips = distinct_clips
        self.reliability_form: ReliabilityForm = reliability_form
        self.modulation: Modulation = modulation
        self.modulation_gradient = modulation_gradient
        _ = self.weighting  # checks its options
        self._factor_checks = {direction: DeferredCheck() for direction in DIRECTIONS}
        self.distillation_weight = float(distillation_weight)
        self.teacher_temperature = float(teacher_temperature)
        self.teacher: Teacher = teacher
        self._stored_teacher.check()

    @property
    def needs_ids(self) -> bool:
        """Whether an option is on that compares clip ids."""
        # What the base class asks is asked here as well: `torch.compile` does not follow `super()` to it.
        compares_clips = self.exclude_self or self.distinct_clips or self.positives != "diagonal"
        return compares_clips or self.needs_training_clips

    @property
    def needs_training_clips(self) -> bool:
        """Whether the knowledge is also the teacher."""
        return self.distillation_weight > 0

    @property
    def needs_prototypes(self) -> bool:
        """Whether the coarse granularity takes part."""
        return "coarse" in self.granularities

    @property
    def _neighbors_by_granularity(self) -> dict[GranularityName, int]:
        """K of each granularity that takes part."""
        counts: dict[GranularityName, int] = {
            "fine": self.num_neighbors,
            "coarse": self.num_coarse_neighbors or self.num_neighbors,
        }
        return {name: counts[name] for name in self.granularities}

    @property
    def weighting(self) -> ReliabilityWeighting:
        """How the reliability enters the loss."""
        return ReliabilityWeighting(
            self.reliability_form,
            self.lambda_fine,
            self.lambda_coarse,
            self.modulation,
            self.modulation_gradient,
        )

    @property
    def _stored_teacher(self) -> StoredTeacher:
        """The teacher by the options as they are now, which a schedule may change."""
        return StoredTeacher(self.distillation_weight, self.teacher_temperature, self.teacher)

    @property
    def against_collapse(self) -> str:
        """What helps against embeddings that become all alike, see `RetrievalLoss`."""
        if not (self.modulation_gradient and self.lambda_fine + self.lambda_coarse > 0):
            return super().against_collapse
        return (
            "The differentiated reliability factor can pull all embeddings of an encoder that is not "
            "pretrained onto their neighbours. Try ReliabilityOTLoss(modulation_gradient=False), a lower "
            "temperature, or pretrained encoders."
        )

    def extra_repr(self) -> str:
        """The options that the paper varies."""
        names = ("num_neighbors", "injection_ratio", "ot_factor", "lambda_fine", "lambda_coarse")
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "granularities"))

    def check_knowledge(self, knowledge: KnowledgeBase) -> None:
        """Refuse a base with fewer rows than the neighbours that are looked up, and prepare others.

        Args:
            knowledge: The new base.

        Raises:
            ValueError: K is larger than the base.
        """
        counts = self._neighbors_by_granularity
        knowledge.check_num_neighbors(counts, exclude=self.exclude_self, distinct_clips=self.distinct_clips)
        knowledge.prepare(self.granularities, clips=self.needs_training_clips)

    def compute(
        self, audio: Embeddings, text: Embeddings, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms, see `RetrievalLoss`.

        Raises:
            ValueError: K is larger than the base, or a factor is not positive (on a GPU, where nothing waits
                for it, that of an earlier batch).
        """
        if knowledge is None:
            return self._without_knowledge(audio, text, ids), {}
        neighborhoods = self.retrieve(pooled(audio), pooled(text), knowledge, ids=ids)
        bounded = self.is_bounded(knowledge)
        targets = self.targets(ids, knowledge, pooled(audio).dtype)
        return self.from_neighborhoods(audio, text, neighborhoods, ids=ids, bounded=bounded, targets=targets)

    def targets(
        self, ids: Tensor | None, knowledge: KnowledgeBase, dtype: torch.dtype
    ) -> BatchTargets | None:
        """The teacher's targets of a batch; `None` for the paper's, the diagonal.

        Args:
            ids: `(B,)` int64, the clips of the samples.
            knowledge: The base that holds the training clips.
            dtype: The dtype of the targets.
        """
        if not self.needs_training_clips:
            return None
        assert ids is not None
        ignore = self._same_clip(ids)
        return self._stored_teacher.targets(knowledge, ids, ignore=ignore, dtype=dtype, gather=self._gathered)

    def retrieve(
        self, audio: Tensor, text: Tensor, knowledge: KnowledgeBase, *, ids: Tensor | None = None
    ) -> dict[GranularityName, Neighborhood]:
        """Look up what a batch of unit embeddings retrieves under this loss's options.

        Args:
            audio: `(B, d)` unit vectors.
            text: `(B, d)` unit vectors.
            knowledge: The base to look up.
            ids: `(B,)` int64 for `exclude_self`.

        Returns:
            A `Neighborhood` for each granularity.
        """
        return knowledge.lookup(
            audio.detach(),
            text.detach(),
            self._neighbors_by_granularity,
            exclude_ids=ids if self.exclude_self else None,
            distinct_clips=self.distinct_clips,
            granularities=self.granularities,
        )

    def is_bounded(self, knowledge: KnowledgeBase) -> bool:
        """Whether the rows that this loss looks up have at most unit length, up to rounding."""
        stored: list[PairStore] = [getattr(knowledge, name) for name in self.granularities]
        return all(pairs.is_bounded for pairs in stored)

    def from_neighborhoods(
        self,
        audio: Embeddings,
        text: Embeddings,
        neighborhoods: dict[GranularityName, Neighborhood],
        *,
        ids: Tensor | None = None,
        bounded: bool = True,
        targets: BatchTargets | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings for neighbours that are looked up already (Eq. 9–19).

        Args:
            audio: `(B, d)` unit vectors, or `TokenEmbeddings` of unit vectors.
            text: Unit vectors of the same kinds.
            neighborhoods: The neighbours of each granularity, as `KnowledgeBase.lookup` returns them.
            ids: `(B,)` int64 for `positives="ids"`.
            bounded: Whether all neighbours have at most unit length.
            targets: Soft targets of the contrast; default the diagonal.

        Returns:
            The loss, 0-d, and its terms by name: Ψ of each sample `(B,)`, all others 0-d.
        """
        ignore = self._same_clip(ids)
        u, v = pooled(audio), pooled(text)  # (B, d)
        similarities: dict[GranularityName, Similarities] = {}
        potentials: dict[tuple[GranularityName, str], Tensor] = {}  # Ψ, (B,) each
        terms: dict[str, Tensor] = targets.terms() if targets is not None else {}
        for name, found in neighborhoods.items():
            neighbors = found.to(u.dtype)
            means = neighbors.means()  # (B, d) each
            injected_audio, injected_text, psi = self.compared(
                self._inject(audio, means[0]),
                self._inject(text, means[1]),
                *neighbors.potentials(u, v, means).values(),  # (B,) each
            )
            similarities[name] = self.similarities(injected_text, injected_audio)
            for direction, potential in zip(DIRECTIONS, psi, strict=True):
                potentials[name, direction] = terms[f"psi_{name}_{direction}"] = potential
        plans = self._plans(list(similarities.values()), bounded)  # (G, P, B, B)
        entropies: dict[str, list[Tensor]] = {direction: [] for direction in DIRECTIONS}
        for pair, plan in zip(similarities.values(), plans.unbind(), strict=True):
            for direction, entropy in self._contrast(pair, plan, ignore, targets).items():
                entropies[direction].append(entropy)  # 0-d, or of each sample (B,)
        terms |= self._terms_of_plans(plans.detach(), list(similarities))
        loss, of_reliability = self.weighting.weigh(
            {direction: reduce(add, of_one) for direction, of_one in entropies.items()},
            potentials,
            checks=None if bounded else self._factor_checks,
        )
        return loss, terms | of_reliability | {"loss": loss}

    def _inject(self, embeddings: Embeddings, neighbors: Tensor) -> Embeddings:
        """Embeddings of one modality, mixed with the mean `(B, d)` of the neighbours that they retrieved."""
        ratio, renormalize = self.injection_ratio, self.renormalize_injected
        if isinstance(embeddings, TokenEmbeddings):
            return embeddings.inject(neighbors, ratio, renormalize=renormalize)
        return inject_knowledge(embeddings, neighbors, ratio, renormalize=renormalize)

    def _plans(self, similarities: Sequence[Similarities], bounded: bool) -> Tensor:
        """The transport plans of all granularities, `(G, P, B, B)`: P is 1, or 2 where directions differ."""
        one_for_both = all(pair.are_symmetric for pair in similarities)
        asked = torch.stack([pair.to_audio for pair in similarities])[:, None]  # (G, 1, B, B)
        if not one_for_both:
            back = torch.stack([pair.to_text for pair in similarities])[:, None]
            asked = torch.cat([asked, back], dim=1)  # (G, 2, B, B)
        return self._solve_transport(
            asked.detach() if self.detach_plan or self.ot_factor == 0 else asked,
            self.sinkhorn_epsilon,
            self.sinkhorn_iterations,
            bounded=bounded and self.interaction is None,
        )

    def _terms_of_plans(self, plans: Tensor, names: Sequence[GranularityName]) -> dict[str, Tensor]:
        """Terms for the log of plans `(G, P, B, B)`."""
        mass = plans * plans.shape[-1]  # rows of sum 1, unless the solver leaves out mass
        terms = {
            "plan_entropy": row_entropy(mass).mean(dim=(1, 2)),
            "plan_diagonal": mass.diagonal(dim1=2, dim2=3).mean(dim=(1, 2)),
        }
        if self.transport_solver != SINKHORN:
            terms["plan_mass"] = plans.sum(dim=(2, 3)).mean(dim=1)
        return {
            f"{term}_{name}": value
            for term, values in terms.items()
            for name, value in zip(names, values.unbind(), strict=True)
        }

    def _contrast(
        self, similarities: Similarities, plans: Tensor, ignore: Tensor | None, targets: BatchTargets | None
    ) -> dict[str, Tensor]:
        """Cross-entropy in both directions after realignment by plans `(P, B, B)`, by direction."""
        if similarities.are_symmetric:
            realigned = realign_both_directions(
                similarities.to_audio,
                plans[0],
                self.ot_factor,
                plan_scaling=self.plan_scaling,
                a2t_realignment=self.a2t_realignment,
            )
        else:
            if self.a2t_realignment != "transposed_plan":
                raise ValueError(
                    'Argument `a2t_realignment` has to be "transposed_plan" with an interaction whose two '
                    "directions differ, each of which has a plan of its own, but got "
                    f"{self.a2t_realignment!r}."
                )
            to_audio, to_text = (
                realign_similarity(scores, plan, self.ot_factor, plan_scaling=self.plan_scaling)
                for scores, plan in zip(similarities[:2], plans, strict=True)
            )
            realigned = to_audio, to_text
        return {
            direction: nt_xent(
                scores,
                self.temperature,
                targets=None if targets is None else getattr(targets, direction),
                ignore=ignore,
                reduction="none" if self.modulation == "sample" else "mean",
            )
            for direction, scores in zip(DIRECTIONS, realigned, strict=True)
        }

    def _without_knowledge(self, audio: Embeddings, text: Embeddings, ids: Tensor | None) -> Tensor:
        """Plain NT-Xent, once for each granularity, with a warning."""
        warn(
            "ReliabilityOTLoss evaluates without knowledge, as plain NT-Xent, because no knowledge base "
            "has been built yet.",
            stacklevel=3,
        )
        audio, text, _ = self.compared(audio, text)
        ignore = self._same_clip(ids)
        similarities = self.similarities(text, audio)
        both = (nt_xent(scores, self.temperature, ignore=ignore) for scores in similarities[:2])
        return len(self.granularities) * 0.5 * sum(both, start=pooled(audio).new_zeros(()))
