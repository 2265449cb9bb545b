"""The equations of the paper and of other losses as pure functions on tensors: no Trainer, no state."""

from ask_lightning.functional.contrastive import nt_xent, pair_targets
from ask_lightning.functional.drift import representation_drift
from ask_lightning.functional.hard_negatives import hard_negative_nt_xent
from ask_lightning.functional.influence import out_of_batch_influence
from ask_lightning.functional.injection import inject_knowledge, unit_length
from ask_lightning.functional.reliability import (
    disagreement,
    modulation_factor,
    reliability_penalty,
    reliability_potential,
    reliability_term,
)
from ask_lightning.functional.sigmoid import sigmoid_losses
from ask_lightning.functional.transport import (
    balance_scores,
    realign_both_directions,
    realign_similarity,
    sinkhorn_plan,
)
from ask_lightning.functional.transport_solvers import find_transport_solver
from ask_lightning.functional.triplet import triplet_hinges

__all__ = [
    "balance_scores",
    "disagreement",
    "find_transport_solver",
    "hard_negative_nt_xent",
    "inject_knowledge",
    "modulation_factor",
    "nt_xent",
    "out_of_batch_influence",
    "pair_targets",
    "realign_both_directions",
    "realign_similarity",
    "reliability_penalty",
    "reliability_potential",
    "reliability_term",
    "representation_drift",
    "sigmoid_losses",
    "sinkhorn_plan",
    "triplet_hinges",
    "unit_length",
]
