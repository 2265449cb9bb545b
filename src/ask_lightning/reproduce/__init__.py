"""Fair comparisons, and the tables and figures made of them."""

from ask_lightning.reproduce.comparison import Run, compare, markdown_table

__all__ = ["Run", "compare", "markdown_table"]
