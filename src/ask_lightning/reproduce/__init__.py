"""Fair comparisons, and the tables and figures made of them."""

from ask_lightning.reproduce.comparison import Run, compare, markdown_table, mean_recall
from ask_lightning.reproduce.figures import training_picture

__all__ = ["Run", "compare", "markdown_table", "mean_recall", "training_picture"]
