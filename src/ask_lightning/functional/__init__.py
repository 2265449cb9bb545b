"""The paper's equations as pure functions on tensors: no Trainer, no state."""

from ask_lightning.functional.contrastive import nt_xent
from ask_lightning.functional.drift import representation_drift
from ask_lightning.functional.influence import out_of_batch_influence
from ask_lightning.functional.injection import inject_knowledge, unit_length
from ask_lightning.functional.reliability import disagreement, modulation_factor, reliability_potential
from ask_lightning.functional.transport import realign_similarity, sinkhorn_plan

__all__ = [
    "disagreement",
    "inject_knowledge",
    "modulation_factor",
    "nt_xent",
    "out_of_batch_influence",
    "realign_similarity",
    "reliability_potential",
    "representation_drift",
    "sinkhorn_plan",
    "unit_length",
]
