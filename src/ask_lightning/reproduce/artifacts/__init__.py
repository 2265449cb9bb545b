"""The paper's tables and figures, and first experiments, as things that a study makes."""

from collections.abc import Mapping
from types import MappingProxyType

from ask_lightning.reproduce.artifacts.artifact import Artifact
from ask_lightning.reproduce.artifacts.experiments import DriftExperiment, LocalityExperiment, NoiseExperiment
from ask_lightning.reproduce.artifacts.observed import DriftFigure, QueryTables
from ask_lightning.reproduce.artifacts.paper_tables import LOSS_TABLE, TABLE1, TABLE2, TABLE4, TABLE5
from ask_lightning.reproduce.artifacts.sweeps import OptionSweep, RefreshSweep
from ask_lightning.reproduce.artifacts.token_bars import TokenBars
from ask_lightning.reproduce.artifacts.zero_shot import TransferFigure

__all__ = ["ARTIFACTS", "EXPERIMENTS", "Artifact"]

_PAPER = (
    TABLE1,
    TABLE2,
    QueryTables("table3"),
    TABLE4,
    TABLE5,
    QueryTables("table6"),
    TokenBars(),
    TransferFigure(),
    RefreshSweep(),
    DriftFigure(),
    OptionSweep(),
)

EXPERIMENTS = ("losses", "locality", "drift", "noise")
"""Names of the experiments, which are not in the paper."""

ARTIFACTS: Mapping[str, Artifact] = MappingProxyType(
    {
        artifact.name: artifact
        for artifact in (*_PAPER, LOSS_TABLE, LocalityExperiment(), DriftExperiment(), NoiseExperiment())
    }
)
"""All tables, figures and experiments by their names on the command line."""
