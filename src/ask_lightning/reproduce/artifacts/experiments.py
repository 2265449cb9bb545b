"""First experiments for a newcomer: what the paper's terms look like in a run of one's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ask_lightning.callbacks import InfluenceMonitor
from ask_lightning.data import RetrievalDataModule
from ask_lightning.losses import ReliabilityOTLoss
from ask_lightning.reproduce.artifacts.artifact import Artifact, write_figure, write_table
from ask_lightning.reproduce.artifacts.corrupted import CorruptedPairs
from ask_lightning.reproduce.artifacts.entries import ASK, NT_XENT, ask
from ask_lightning.reproduce.artifacts.plots import BASELINE_COLOR, COLORS, draw_mean_curve, new_figure
from ask_lightning.reproduce.artifacts.sweeps import entries_by_period
from ask_lightning.reproduce.figures import read_column
from ask_lightning.reproduce.methods import LossVariant
from ask_lightning.reproduce.run_table import Run
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tables import mean_and_deviation
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.text_tables import Cell

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MONITORS = (partial(InfluenceMonitor, every_n_steps=10, per_epoch=True),)


def _watched(name: str, like: Entry, **options: Any) -> Entry:
    variant = LossVariant(ReliabilityOTLoss, ASK.variant.grid, options=options, callbacks=_MONITORS)
    return Entry(name, variant, like=like)


LOCALITY = {
    "NT-Xent": _watched(
        "NT-Xent, influence",
        NT_XENT,
        injection_ratio=0.0,
        ot_factor=0.0,
        lambda_fine=0.0,
        lambda_coarse=0.0,
        granularities=("fine",),
    ),
    "ASK without injection": _watched("ASK without injection, influence", ASK, injection_ratio=0.0),
    "ASK": _watched("ASK, influence", ASK),
}
"""NT-Xent is `ReliabilityOTLoss` with everything switched off, which is the same loss to the last bit."""


class LocalityExperiment(Artifact):
    """The gradient locality bottleneck: how strongly pairs outside the batch move the loss."""

    def __init__(self) -> None:
        super().__init__("locality", "out-of-batch influence of NT-Xent and of ASK")

    def entries(self, task: Task) -> Sequence[Entry]:
        """NT-Xent and ASK, with and without injection, whose influence is measured.

        Args:
            task: The task.
        """
        return list(LOCALITY.values())

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the picture and its table."""
        figure = new_figure(9, 3.6)
        influence, recall = figure.subplots(1, 2)
        rows: list[list[Cell]] = []
        for number, (label, entry) in enumerate(LOCALITY.items()):
            runs = trained[entry.name].runs
            curves = [read_column(run.file("metrics.csv"), "ask/obi_fine") for run in runs]
            color = COLORS[number] if number else BASELINE_COLOR
            draw_mean_curve(influence, curves, color=color, label=label)
            _draw_validation(recall, runs, color, label)
            mean = statistics.fmean(statistics.fmean(values) for _, values in curves)
            rows.append([label, f"{mean:.2e}", mean_and_deviation(trained[entry.name].test_recalls)])
        influence.set(title="influence of pairs outside the batch (OBI)", xlabel="epoch")
        _finish_validation(recall)
        influence.grid(alpha=0.3)
        influence.legend(fontsize=8)
        columns = ["loss", "OBI, mean over training", "test mean recall"]
        text = write_table(folder, self.name, columns, rows) + (
            "\n\nOBI (Eq. 2) is the mean norm of the loss's gradient with respect to stored pairs. A loss "
            "that sees its batch alone has none."
        )
        write_figure(folder, self.name, figure)
        return text


class DriftExperiment(Artifact):
    """Representation drift: how far encoders move from their knowledge until it is renewed."""

    def __init__(self) -> None:
        super().__init__("drift", "representation drift for static and renewed knowledge")

    def entries(self, task: Task) -> Sequence[Entry]:
        """ASK with each T of Figure 5.

        Args:
            task: The task.
        """
        return list(entries_by_period(task).values())

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the picture and its table."""
        figure = new_figure(13, 3.6)
        audio, text, recall = figure.subplots(1, 3)
        rows: list[list[Cell]] = []
        for number, (period, entry) in enumerate(entries_by_period(study.task).items()):
            runs, label = trained[entry.name].runs, f"T = {period}"
            color = COLORS[number % len(COLORS)]
            cells: list[Cell] = []
            for axis, side in ((audio, "audio"), (text, "text")):
                curves = [read_column(run.file("metrics.csv"), f"ask/probe_rdm_{side}") for run in runs]
                draw_mean_curve(axis, curves, color=color, label=label)
                means = [statistics.fmean(values) for _, values in curves]
                cells.append(f"{statistics.fmean(means):.2e}")
            _draw_validation(recall, runs, color, label)
            rows.append([label, *cells, mean_and_deviation(trained[entry.name].test_recalls)])
        for axis, side in ((audio, "audio"), (text, "text")):
            axis.set(title=f"drift of the {side} encoder (RDM)", xlabel="epoch", ylabel="nats")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        _finish_validation(recall)
        columns = ["ASK with", "RDM of audio, mean", "RDM of text, mean", "test mean recall"]
        note = "RDM (Eq. 4) of stored against fresh embeddings of the same pairs, after each epoch."
        write_figure(folder, self.name, figure)
        return f"{write_table(folder, self.name, columns, rows)}\n\n{note}"


class NoiseExperiment(Artifact):
    """Reliability: what a growing share of wrong pairs in the knowledge does, with and without weighting."""

    def __init__(self) -> None:
        super().__init__("noise", "corrupted knowledge, with and without reliability weighting")

    def entries(self, task: Task) -> Sequence[Entry]:
        """ASK with each share of wrong pairs, with and without weighting.

        Args:
            task: The task.
        """
        return [entry for by_share in _by_share(task).values() for entry in by_share]

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the picture and its table."""
        figure = new_figure(9, 3.6)
        recall, factor = figure.subplots(1, 2)
        rows: list[list[Cell]] = []
        for number, (label, by_share) in enumerate(_by_share(study.task).items()):
            found = [trained[entry.name] for entry in by_share]
            recalls = [one.test_recalls for one in found]
            for share, seeds in zip(_SHARES, recalls, strict=True):
                recall.scatter([share] * len(seeds), seeds, s=14, color=COLORS[number], alpha=0.4)
            means = [statistics.fmean(seeds) for seeds in recalls]
            recall.plot(_SHARES, means, marker="o", color=COLORS[number], label=label)
            factors = [_mean_of(one.runs, ("ask/factor_a2t", "ask/factor_t2a")) for one in found]
            if not number:
                factor.plot(_SHARES, factors, marker="o", color=COLORS[number], label=label)
            rows += [
                [f"{share:.0%}", label, mean_and_deviation(seeds), f"{value:.3f}"]
                for share, seeds, value in zip(_SHARES, recalls, factors, strict=True)
            ]
        recall.set(title="test: mean of R@1, R@5, R@10", ylabel="%", xlabel="share of wrong pairs")
        factor.set(title="factor of the loss, mean over training", xlabel="share of wrong pairs")
        for axis in (recall, factor):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        columns = ["wrong pairs", "loss", "test mean recall", "factor"]
        note = "A wrong pair of the knowledge has the text of another pair. Training pairs stay right."
        write_figure(folder, self.name, figure)
        return f"{write_table(folder, self.name, columns, rows)}\n\n{note}"


def _by_share(task: Task) -> dict[str, list[Entry]]:
    """The entries with and without weighting, for each share of wrong pairs."""
    by_label: dict[str, list[Entry]] = {}
    for label, options in (
        ("with weighting", {}),
        ("without weighting", {"lambda_fine": 0.0, "lambda_coarse": 0.0}),
    ):
        by_label[label] = [
            ASK
            if not share and not options
            else ask(
                f"{share:.0%} wrong {label}",
                refresh={"source": partial(_corrupted, task.make_data, share)},
                like=ASK,
                **options,
            )
            for share in _SHARES
        ]
    return by_label


def _corrupted(make_data: Callable[[int], RetrievalDataModule], share: float) -> Dataset[Any]:
    """The training pairs of which a share has the text of another pair."""
    data: Any = make_data(0)
    return CorruptedPairs(data.datasets["train"], share)


def _mean_of(runs: Sequence[Run], names: Sequence[str]) -> float:
    """The mean of logged values over epochs and runs."""
    values = [read_column(run.file("metrics.csv"), name)[1] for run in runs for name in names]
    return statistics.fmean(value for column in values for value in column)


def _draw_validation(axis: Any, runs: Sequence[Run], color: str, label: str) -> None:
    curves = []
    for run in runs:
        epochs, values = read_column(run.file("metrics.csv"), "val/mean_recall")
        curves.append((epochs, [100 * value for value in values]))
    draw_mean_curve(axis, curves, color=color, label=label)


def _finish_validation(axis: Any) -> None:
    axis.set(title="validation: mean recall", xlabel="epoch", ylabel="%")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
