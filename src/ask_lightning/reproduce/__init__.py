"""Fair comparisons, and the tables and figures made of them."""

from ask_lightning.reproduce.comparison import Run, compare, markdown_table, mean_recall
from ask_lightning.reproduce.figures import training_picture
from ask_lightning.reproduce.training import hush, train_and_judge

__all__ = [
    "Run",
    "compare",
    "hush",
    "markdown_table",
    "mean_recall",
    "train_and_judge",
    "training_picture",
]
