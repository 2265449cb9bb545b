"""The recalls that the paper prints: ASK, arXiv 2512.19703 version 2, tables 1, 2, 4 and 5."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ask_lightning.metrics.table import RECALLS

DATASETS = ("AudioCaps", "Clotho")
"""The datasets of the paper."""

BACKBONES = ("ResNet-38 + BERT", "CED-Base + SONAR-TE")
"""The models of the paper."""


@dataclass(frozen=True)
class PublishedRow:
    """A line of one of the paper's tables.

    Attributes:
        table: Name of the table, such as `"table1"`.
        backbone: One of `BACKBONES`.
        system: Name of the method in the paper. The published text has lost the symbols of ASK's two other
            knowledge sources, so that they are called by their order.
        dataset: One of `DATASETS`.
        recalls: Recalls under the names in `RECALLS`, in percent.
    """

    table: str
    backbone: str
    system: str
    dataset: str
    recalls: Mapping[str, float]


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All lines, in the order of the paper.

    Examples:
        >>> published_rows()[0].system, published_rows()[0].recalls["a2t/recall_at_1"]
        ('ML-ACT', 36.3)
    """
    text = files("ask_lightning.reproduce").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(
        PublishedRow(
            row["table"],
            row["backbone"],
            row["system"],
            row["dataset"],
            {name: float(row[name]) for name in RECALLS},
        )
        for row in csv.DictReader(text.splitlines())
    )


def published_row(table: str, system: str, dataset: str, backbone: str = BACKBONES[0]) -> PublishedRow:
    """A line by its names.

    Args:
        table: Name of the table, such as `"table1"`.
        system: Name of the method in the paper.
        dataset: One of `DATASETS`.
        backbone: One of `BACKBONES`.

    Returns:
        The line.

    Raises:
        ValueError: The paper has no such line.
    """
    for row in published_rows():
        if (row.table, row.system, row.dataset, row.backbone) == (table, system, dataset, backbone):
            return row
    raise ValueError(f"The paper's {table} has no line {system!r} of {backbone} on {dataset}.")
