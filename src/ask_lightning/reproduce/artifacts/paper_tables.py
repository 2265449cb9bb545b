"""The lines of the paper's tables 1, 2, 4 and 5, and of one of our own."""

from __future__ import annotations

from collections.abc import Sequence

from ask_lightning.reproduce.artifacts.entries import (
    ASK,
    LABEL_SMOOTHING,
    NT_XENT,
    TEACHER,
    ask,
    ask_with_sources,
    by_tokens,
)
from ask_lightning.reproduce.artifacts.recall_tables import RecallTable, Row
from ask_lightning.reproduce.methods import LOSSES
from ask_lightning.reproduce.published import BACKBONES, DATASETS, PublishedRow, published_row
from ask_lightning.reproduce.study import Entry
from ask_lightning.reproduce.tasks.task import Task

STATIC = 10**6
"""A number of epochs T that no training reaches: knowledge that is never renewed."""

# The paper's names of WavCaps and of new captions as knowledge. A task's sources that are other captions of
# its training clips stand beside the latter, all others beside WavCaps.
_OTHER_CLIPS, _OTHER_CAPTIONS = "ASK, first source", "ASK, second source"

_BEYOND = (
    Row("Label smoothing (beyond the paper)", LABEL_SMOOTHING),
    Row("Teacher (beyond the paper)", TEACHER),
)

# Our names of GPA's and FLAM's interaction, see `ask_lightning.interaction`.
TOKENS = {"GPA": "prototypes", "FLAM": "frames"}
"""The models of the paper that compare by tokens, and the interaction of ours in their manner."""


def _published(task: Task, table: str, system: str, backbone: str | None = None) -> PublishedRow:
    """The paper's line on the dataset that is nearest to a task."""
    dataset = DATASETS[1] if task.name == "clotho" and table in ("table1", "table4") else DATASETS[0]
    return published_row(table, system, dataset, backbone or BACKBONES[0])


def _published_source(name: str) -> str:
    """The paper's name of the knowledge that is most like a task's source."""
    return _OTHER_CAPTIONS if name.endswith("other captions") else _OTHER_CLIPS


def _table1(task: Task) -> Sequence[Row]:
    is_ced = task.description.get("backbone") == "ced_sonar"
    backbone = BACKBONES[is_ced]

    def paper(system: str) -> PublishedRow:
        return _published(task, "table1", system, backbone)

    plain, others = ("ML-CLAP", ("GLAP",)) if is_ced else ("ML-ACT", ("BLAT", "Auto-ACD"))
    rows = [Row("NT-Xent", NT_XENT, paper(plain))]
    rows += [Row(f"{system} (published)", published=paper(system)) for system in others]
    sources = ask_with_sources(task)
    for system in (_OTHER_CLIPS, _OTHER_CAPTIONS):
        own = [name for name in sources if _published_source(name) == system]
        rows += [Row(f"ASK, knowledge: {name}", sources[name], paper(system)) for name in own]
        if not own:
            rows.append(Row(f"{system} (published)", published=paper(system)))
    return [*rows, Row("ASK, knowledge: training pairs", ASK, paper("ASK+")), *_BEYOND]


def _table2(task: Task) -> Sequence[Row]:
    def row(label: str, entry: Entry) -> Row:
        return Row(label, entry, _published(task, "table2", label))

    return [
        row("without ASK", NT_XENT),
        row("without fine base", ask("without fine base", granularities=("coarse",))),
        row("without coarse base", ask("without coarse base", granularities=("fine",))),
        row("without injection", ask("without injection", injection_ratio=0.0)),
        row("without OT realignment", ask("without OT realignment", ot_factor=0.0)),
        row(
            "without reliability weighting",
            ask("without reliability weighting", lambda_fine=0.0, lambda_coarse=0.0),
        ),
        row("without refinement (static base)", ask("static base", refresh={"T": STATIC})),
        row("full ASK+", ASK),
        *_BEYOND,
    ]


def _table4(task: Task) -> Sequence[Row]:
    rows = []
    for system, tokens in TOKENS.items():
        # The paper does not say which of the two its ASK rows extend; they stand beside those of GPA.
        paper = system == "GPA"

        def published(name: str, show: bool) -> PublishedRow | None:
            return _published(task, "table4", name) if show else None

        rows.append(Row(system, by_tokens(system, tokens, plain=True), published(system, True)))
        for name, make in task.knowledge_sources.items():
            label = f"{system} + ASK, knowledge: {name}"
            entry = by_tokens(label, tokens, refresh={"source": make}, plain=False)
            rows.append(Row(label, entry, published(_published_source(name), paper)))
        label = f"{system} + ASK, knowledge: training pairs"
        entry = by_tokens(f"{system} + ASK", tokens, plain=False)
        rows.append(Row(label, entry, published("ASK+", paper)))
    return rows


def _table5(task: Task) -> Sequence[Row]:
    def paper(system: str) -> PublishedRow:
        return _published(task, "table5", system)

    return [
        Row("NT-Xent", NT_XENT, paper("ML-ACT")),
        Row("NNCLR", Entry("NNCLR", LOSSES["NNCLR"]), paper("NNCLR")),
        Row("ANCE (mined negatives)", Entry("Mined negatives", LOSSES["Mined negatives"]), paper("ANCE")),
        Row("MoCo", Entry("Momentum contrast", LOSSES["Momentum contrast"]), paper("MoCo")),
        Row("ASK, knowledge: training pairs", ASK, paper("ASK+")),
        *_BEYOND,
    ]


def _losses(task: Task) -> Sequence[Row]:
    return [Row(name, Entry(name, variant)) for name, variant in LOSSES.items()]


TABLE1 = RecallTable("table1", "methods and knowledge sources", _table1, references=("NT-Xent",))
TABLE2 = RecallTable("table2", "what each part of ASK does", _table2, references=("without ASK", "full ASK+"))
TABLE4 = RecallTable(
    "table4",
    "comparison by tokens, with and without ASK",
    _table4,
    references=tuple(TOKENS),
    needs_tokens=True,
)
TABLE5 = RecallTable("table5", "other ways to look beyond the batch", _table5, references=("NT-Xent",))
LOSS_TABLE = RecallTable(
    "losses",
    "all losses of this library in the same seat",
    _losses,
    references=("NT-Xent", "Label smoothing"),
)
