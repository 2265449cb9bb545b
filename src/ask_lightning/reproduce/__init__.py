"""Fair comparisons, and the tables and figures made of them."""

from ask_lightning.metrics.table import mean_recall
from ask_lightning.reproduce.comparison import Comparison, Method, Protocol, compare
from ask_lightning.reproduce.evaluation import Metrics
from ask_lightning.reproduce.figures import comparison_picture
from ask_lightning.reproduce.loss_comparison import compare_losses
from ask_lightning.reproduce.methods import LOSSES, MAIN_LOSSES, MAX_CANDIDATES, LossVariant, loss_methods
from ask_lightning.reproduce.report import write_report
from ask_lightning.reproduce.run_table import Run, RunsError
from ask_lightning.reproduce.statistics import PairedDifference, paired_difference
from ask_lightning.reproduce.tables import comparison_markdown, differences_markdown, tuning_markdown
from ask_lightning.reproduce.training import silence_lightning, train_and_evaluate

__all__ = [
    "LOSSES",
    "MAIN_LOSSES",
    "MAX_CANDIDATES",
    "Comparison",
    "LossVariant",
    "Method",
    "Metrics",
    "PairedDifference",
    "Protocol",
    "Run",
    "RunsError",
    "compare",
    "compare_losses",
    "comparison_markdown",
    "comparison_picture",
    "differences_markdown",
    "loss_methods",
    "mean_recall",
    "paired_difference",
    "silence_lightning",
    "train_and_evaluate",
    "tuning_markdown",
    "write_report",
]
