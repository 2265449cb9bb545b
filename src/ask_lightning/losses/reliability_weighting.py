"""How the reliability enters the loss, Eq. 16–19, 21 and 33–34. Axes: `B` batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from ask_lightning.functional import modulation_factor, reliability_penalty, reliability_term
from ask_lightning.functional.reliability import ReliabilityForm
from ask_lightning.knowledge.base import GranularityName
from ask_lightning.utilities.arguments import check_choice, check_range
from ask_lightning.utilities.deferred_check import DeferredCheck

Modulation = Literal["batch", "sample"]
DIRECTIONS = ("t2a", "a2t")
Potentials = Mapping[tuple[GranularityName, str], Tensor]
"""Ψ of each sample, `(B,)`, by granularity and direction."""


@dataclass(frozen=True)
class ReliabilityWeighting:
    """The reliability as a factor of the cross-entropy or as a term beside it.

    Args:
        form: What enters the loss and how, see `ReliabilityOTLoss`.
        lambda_fine: λ_f ≥ 0. For a factor λ_f + λ_c < 1.
        lambda_coarse: λ_c ≥ 0.
        modulation: `"batch"` or `"sample"`: whose mean reliability is a factor of a sample's cross-entropy.
        modulation_gradient: Whether a factor is differentiated.

    Raises:
        ValueError: An argument is out of range, or says nothing about a term.
    """

    form: ReliabilityForm
    lambda_fine: float
    lambda_coarse: float
    modulation: Modulation
    modulation_gradient: bool

    def __post_init__(self) -> None:
        check_choice("reliability_form", self.form, get_args(ReliabilityForm))
        check_choice("modulation", self.modulation, get_args(Modulation))
        if self.is_term:
            self._check_term()
        else:
            self._check_factor()

    @property
    def is_term(self) -> bool:
        """Whether the reliability is added, not multiplied."""
        return self.form.endswith("term")

    def weigh(
        self,
        entropies: Mapping[str, Tensor],
        potentials: Potentials,
        *,
        checks: Mapping[str, DeferredCheck] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of both directions, Eq. 16–19, or Eq. 21 and 33–34.

        Args:
            entropies: Cross-entropies by direction, summed over granularities: 0-d, or of each sample `(B,)`.
            potentials: Ψ of each sample.
            checks: Checks by direction of what the factors become. None: all knowledge has at most unit
                length, so that factors are positive.

        Returns:
            The mean of both directions, 0-d, and its terms by name, 0-d.

        Raises:
            ValueError: A factor is not positive, or on a GPU that of an earlier batch was not.
        """
        weighed, terms = [], {}
        penalties = self._penalties(potentials)
        if self.modulation == "batch":
            penalties = penalties.mean(dim=1)
        by_direction = self._weighted(potentials, penalties)
        for direction in DIRECTIONS:
            entropy, weighted = entropies[direction], by_direction[direction]
            terms[f"contrastive_{direction}"] = _mean(entropy)
            if self.is_term:
                term = reliability_term(weighted.values())  # 0-d
                weighed.append(_mean(entropy) + term)
                terms[f"reliability_{direction}"] = term
                continue
            factor = modulation_factor(weighted.values())  # 0-d, or of each sample (B,)
            if checks is not None:
                checks[direction](factor.min(), partial(self._refuse_factor, direction))
            used = factor if self.modulation_gradient else factor.detach()
            weighed.append(_mean(used * entropy))
            terms[f"factor_{direction}"] = _mean(factor)
            for name, (strength, penalty) in weighted.items():
                terms[f"factor_{name}_{direction}"] = modulation_factor([(strength, _mean(penalty.detach()))])
        return 0.5 * (weighed[0] + weighed[1]), terms

    def factors(self, potentials: Potentials) -> dict[str, Tensor]:
        """The factors of each sample; none where the reliability is a term.

        Args:
            potentials: Ψ of each sample.

        Returns:
            The factor of each sample, `(B,)`, by direction.
        """
        if self.is_term:
            return {}
        by_direction = self._weighted(potentials, self._penalties(potentials))
        return {
            direction: modulation_factor(weighted.values()) for direction, weighted in by_direction.items()
        }

    def _penalties(self, potentials: Potentials) -> Tensor:
        """F of each sample for all potentials, `(P, B)`."""
        return reliability_penalty(torch.stack(list(potentials.values())), self.form)

    def _weighted(
        self, potentials: Potentials, penalties: Tensor
    ) -> dict[str, dict[GranularityName, tuple[float, Tensor]]]:
        """(λ_g, F_g) of each direction and granularity; F_g is a row of `penalties`, `(P,)` or `(P, B)`."""
        lambdas = {"fine": self.lambda_fine, "coarse": self.lambda_coarse}
        weighted: dict[str, dict[GranularityName, tuple[float, Tensor]]] = {to: {} for to in DIRECTIONS}
        for (name, to), penalty in zip(potentials, penalties.unbind(), strict=True):
            weighted[to][name] = (lambdas[name], penalty)
        return weighted

    def _refuse_factor(self, direction: str, smallest: float) -> None:
        """Refuse a factor by which training would lead away from the pairs."""
        if smallest <= 0:
            raise ValueError(
                f"The modulation factor of direction {direction} fell to {smallest:.3f}, and "
                "a factor that is not positive trains the model away from its pairs. The knowledge "
                "holds vectors longer than one: use `normalize_prototypes=True`, or lower "
                f"`lambda_fine` ({self.lambda_fine}) and `lambda_coarse` ({self.lambda_coarse})."
            )

    def _check_factor(self) -> None:
        """Refuse weights by which the factor could become negative."""
        fine, coarse = self.lambda_fine, self.lambda_coarse
        if not (fine >= 0 and coarse >= 0 and fine + coarse < 1):
            raise ValueError(
                "Arguments `lambda_fine` and `lambda_coarse` have to be at least 0 and sum to less than 1, "
                f"but got {fine} and {coarse}: the modulation factor 1 + λ_f F_f + λ_c F_c with F in [-1, 1] "
                "could become negative and train the model away from its pairs."
            )

    def _check_term(self) -> None:
        """Refuse options that say nothing about a reliability that is added."""
        check_range("lambda_fine", self.lambda_fine, 0)
        check_range("lambda_coarse", self.lambda_coarse, 0)
        if self.modulation == "sample":
            raise ValueError(
                f'Argument `modulation` has to be "batch" with reliability_form={self.form!r}, but got '
                '"sample": a term that is added has the same mean over the batch either way.'
            )
        if not self.modulation_gradient:
            raise ValueError(
                f"Argument `modulation_gradient` has to be True with reliability_form={self.form!r}, but got "
                "False: a constant that is added changes nothing. Set both λ to 0 to leave the term out."
            )


def _mean(values: Tensor) -> Tensor:
    """The mean over samples; one value for the batch is that already."""
    return values.mean() if values.ndim else values
