"""Fair comparisons, and the tables and figures made of them."""

from ask_lightning.reproduce.comparison import Run, compare, comparison_markdown, mean_recall
from ask_lightning.reproduce.figures import training_picture
from ask_lightning.reproduce.training import silence_lightning, train_and_evaluate

__all__ = [
    "Run",
    "compare",
    "comparison_markdown",
    "mean_recall",
    "silence_lightning",
    "train_and_evaluate",
    "training_picture",
]
