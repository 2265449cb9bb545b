"""`ReliabilityOTLoss`: Eq. 9–19 of the paper as one module.

Axes: `B` batch, `K` neighbours, `d` width. "t2a" is text-to-audio: rows are texts, columns audios.
"""

from collections.abc import Sequence
from typing import Literal, get_args
from warnings import warn

import torch
from torch import Tensor

from ask_lightning.functional import (
    disagreement,
    inject_knowledge,
    modulation_factor,
    nt_xent,
    realign_similarity,
    sinkhorn_plan,
)
from ask_lightning.functional.distillation import Teacher
from ask_lightning.interaction import Embeddings, TokenEmbeddings, pooled
from ask_lightning.knowledge.base import GRANULARITIES, GranularityName, KnowledgeBase
from ask_lightning.knowledge.pairs import Neighborhood, PairStore
from ask_lightning.losses.base import Positives, Temperature
from ask_lightning.losses.interacting import InteractingLoss, InteractionLike
from ask_lightning.losses.teacher import BatchTargets, KnowledgeTeacher
from ask_lightning.utilities.arguments import check_choice, check_count, check_positive, check_range

PlanScaling = Literal["marginal", "row"]
Modulation = Literal["batch", "sample"]
DIRECTIONS = ("t2a", "a2t")


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
            positive; a negative one would train the model away from its pairs.
        lambda_coarse: λ_c ≥ 0, the weight of the coarse reliability.
        temperature: τ > 0: a number, the name of the wrapped model's attribute that *is* τ, such as a
            learnable parameter or a property, a callable `(model)` that returns τ, or the parameter itself.
            A loss without a wrapper also takes a callable without arguments.
        sinkhorn_epsilon: ε > 0, the weight of the transport plan's entropy.
        sinkhorn_iterations: Number of updates of the plan, at least 1.
        granularities: The granularities that take part: `"fine"`, `"coarse"` or both.
        renormalize_injected: Whether to bring injected embeddings back to unit length.
        plan_scaling: `"marginal"` (the paper: rows of the plan sum to 1/B) or `"row"` (rows sum to 1).
        detach_plan: Whether the plan is constant in the backward pass.
        exclude_self: Whether to leave out knowledge rows of the query's own clip; needs ids.
        positives: `"diagonal"` (the paper), or `"ids"`: other captions of the same clip are left out of the
            denominator; needs ids.
        modulation: `"batch"`: the loss of the batch is weighed by the mean reliability (the paper);
            `"sample"`: the loss of each sample by its own.
        modulation_gradient: Whether to differentiate the factor as well.
        interaction: How texts and audios are compared: None is the dot product of pooled embeddings; others
            are the name of the model's attribute that is an `Interaction`, the interaction itself, or another
            callable `(text, audio)` that returns `Similarities` or one matrix `(B, B)` with texts as rows.
            It compares the injected embeddings; tokens all get the knowledge that their pooled embedding
            retrieved.
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
        renormalize_injected: bool = False,
        plan_scaling: PlanScaling = "marginal",
        detach_plan: bool = True,
        exclude_self: bool = False,
        positives: Positives = "diagonal",
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
        check_choice("modulation", modulation, get_args(Modulation))
        if not granularities or not set(granularities) <= set(GRANULARITIES):
            raise ValueError(
                f"Argument `granularities` has to name one or both of {GRANULARITIES}, "
                f"but got {tuple(granularities)}."
            )
        _check_modulation(lambda_fine, lambda_coarse)
        self.num_neighbors = num_neighbors
        # NumPy numbers would make checkpoints that `weights_only=True` refuses.
        self.injection_ratio = float(injection_ratio)
        self.ot_factor = float(ot_factor)
        self.lambda_fine = float(lambda_fine)
        self.lambda_coarse = float(lambda_coarse)
        self.sinkhorn_epsilon = float(sinkhorn_epsilon)
        self.sinkhorn_iterations = sinkhorn_iterations
        self.granularities = tuple(name for name in GRANULARITIES if name in granularities)
        self.renormalize_injected = renormalize_injected
        self.plan_scaling = plan_scaling
        self.detach_plan = detach_plan
        self.exclude_self = exclude_self
        self.modulation = modulation
        self.modulation_gradient = modulation_gradient
        self.distillation_weight = float(distillation_weight)
        self.teacher_temperature = float(teacher_temperature)
        self.teacher: Teacher = teacher
        self._teacher = KnowledgeTeacher(self.distillation_weight, self.teacher_temperature, teacher)

    @property
    def needs_ids(self) -> bool:
        """Whether an option is on that compares clip ids."""
        return self.exclude_self or super().needs_ids or self.needs_training_clips

    @property
    def needs_training_clips(self) -> bool:
        """Whether the knowledge is also the teacher."""
        return self.distillation_weight > 0

    def extra_repr(self) -> str:
        """The options that the paper varies."""
        names = ("num_neighbors", "injection_ratio", "ot_factor", "lambda_fine", "lambda_coarse")
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "granularities"))

    def check_knowledge(self, knowledge: KnowledgeBase) -> None:
        """Refuse a base with fewer rows than the neighbours that are looked up.

        Args:
            knowledge: The new base.

        Raises:
            ValueError: K is larger than the base.
        """
        knowledge.check_num_neighbors(self.num_neighbors, exclude=self.exclude_self)

    def compute(
        self, audio: Embeddings, text: Embeddings, ids: Tensor | None, knowledge: KnowledgeBase | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of unit embeddings and its terms, see `RetrievalLoss`.

        Raises:
            ValueError: K is larger than the base, or a factor is not positive.
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
        return self._teacher.targets(knowledge, ids, ignore, dtype, self._gathered)

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
            self.num_neighbors,
            exclude_ids=ids if self.exclude_self else None,
            granularities=self.granularities,
        )

    def is_bounded(self, knowledge: KnowledgeBase) -> bool:
        """Whether the rows that this loss looks up have at most unit length, up to rounding."""
        stored: list[PairStore] = [getattr(knowledge, name) for name in self.granularities]
        # Unit vectors stored in half precision are a little longer or shorter.
        return all(
            pairs.max_norm <= 1 + max(1e-5, 2 * torch.finfo(pairs.local.audio.dtype).eps) for pairs in stored
        )

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
        lambdas = {"fine": self.lambda_fine, "coarse": self.lambda_coarse}
        entropies = dict.fromkeys(DIRECTIONS, u.new_zeros(()))  # Σ_g CE, 0-d, or of each sample (B,)
        # (λ_g, F_g) of each granularity, F_g of each sample (B,)
        weighted: dict[str, list[tuple[float, Tensor]]] = {direction: [] for direction in DIRECTIONS}
        terms: dict[str, Tensor] = targets.terms() if targets is not None else {}
        for name, found in neighborhoods.items():
            neighbors = found.to(u.dtype)
            injected_audio, injected_text, psi = self.compared(
                self._inject(audio, neighbors.audio_by_audio),
                self._inject(text, neighbors.text_by_text),
                *neighbors.potentials(u, v).values(),  # (B,) each
            )
            potentials = dict(zip(DIRECTIONS, psi, strict=True))
            contrast, plans = self._contrast(injected_audio, injected_text, ignore, bounded, targets)
            for direction in DIRECTIONS:
                entropies[direction] = entropies[direction] + contrast[direction]
                unreliability = disagreement(potentials[direction])
                weighted[direction].append((lambdas[name], unreliability))
                terms[f"psi_{name}_{direction}"] = potentials[direction]
                terms[f"factor_{name}_{direction}"] = modulation_factor(
                    [(lambdas[name], unreliability.mean())]
                )
            mass = plans * plans.shape[1]  # rows of sum 1
            terms[f"plan_entropy_{name}"] = -torch.xlogy(mass, mass).sum(dim=2).mean()
            terms[f"plan_diagonal_{name}"] = mass.diagonal(dim1=1, dim2=2).mean()
        factors = {direction: modulation_factor(weighted[direction]) for direction in DIRECTIONS}  # (B,)
        loss = self._weigh(entropies, factors, terms, bounded)
        return loss, terms | {"loss": loss}

    def _inject(self, embeddings: Embeddings, neighbors: Tensor) -> Embeddings:
        """Embeddings of one modality, mixed with the neighbours `(B, K, d)` that they retrieved."""
        ratio, renormalize = self.injection_ratio, self.renormalize_injected
        if isinstance(embeddings, TokenEmbeddings):
            return embeddings.inject(neighbors, ratio, renormalize=renormalize)
        return inject_knowledge(embeddings, neighbors, ratio, renormalize=renormalize)

    def _contrast(
        self,
        audio: Embeddings,
        text: Embeddings,
        ignore: Tensor | None,
        bounded: bool,
        targets: BatchTargets | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Cross-entropy of injected embeddings in both directions after realignment.

        Returns:
            The cross-entropies by direction, and the plans: one `(1, B, B)`, or one for each direction.
        """
        similarities = self.similarities(text, audio)  # (B, B) each
        plan = self._plan(similarities.to_audio, bounded)
        plans = [plan, plan.T if similarities.are_symmetric else self._plan(similarities.to_text, bounded)]
        contrast = {}
        for direction, scores, transport in zip(DIRECTIONS, similarities[:2], plans, strict=True):
            realigned = realign_similarity(scores, transport, self.ot_factor, plan_scaling=self.plan_scaling)
            contrast[direction] = nt_xent(
                realigned,
                self.temperature,
                targets=None if targets is None else getattr(targets, direction),
                ignore=ignore,
                reduction="none" if self.modulation == "sample" else "mean",
            )
        return contrast, torch.stack(plans[: 1 if similarities.are_symmetric else 2]).detach()

    def _plan(self, similarity: Tensor, bounded: bool) -> Tensor:
        """The transport plan of the similarities of one direction, `(B, B)`."""
        return sinkhorn_plan(
            similarity.detach() if self.detach_plan or self.ot_factor == 0 else similarity,
            self.sinkhorn_epsilon,
            self.sinkhorn_iterations,
            bounded=bounded and self.interaction is None,
        )

    def _weigh(
        self,
        entropies: dict[str, Tensor],
        factors: dict[str, Tensor],
        terms: dict[str, Tensor],
        bounded: bool,
    ) -> Tensor:
        """Eq. 16–19: the mean of both directions, each weighed by its factors `(B,)`. Adds to `terms`."""
        weighed = []
        for direction in DIRECTIONS:
            factor = factors[direction].mean() if self.modulation == "batch" else factors[direction]
            if not bounded and bool((factor <= 0).any()):
                raise ValueError(
                    f"The modulation factor of direction {direction} fell to {float(factor.min()):.3f}, and "
                    "a factor that is not positive trains the model away from its pairs. The knowledge "
                    "holds vectors longer than one: use `normalize_prototypes=True`, or lower "
                    f"`lambda_fine` ({self.lambda_fine}) and `lambda_coarse` ({self.lambda_coarse})."
                )
            used = factor if self.modulation_gradient else factor.detach()
            weighed.append((used * entropies[direction]).mean())
            terms[f"contrastive_{direction}"] = entropies[direction].mean()
            terms[f"factor_{direction}"] = factor.mean()
        return 0.5 * (weighed[0] + weighed[1])

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


def _check_modulation(lambda_fine: float, lambda_coarse: float) -> None:
    if not (lambda_fine >= 0 and lambda_coarse >= 0 and lambda_fine + lambda_coarse < 1):
        raise ValueError(
            "Arguments `lambda_fine` and `lambda_coarse` have to be at least 0 and sum to less than 1, but "
            f"got {lambda_fine} and {lambda_coarse}: the modulation factor 1 + λ_f F_f + λ_c F_c with F in "
            "[-1, 1] could become negative and train the model away from its pairs."
        )
