"""Table 3, Table 6 and Figure 6: one run that is looked at more closely.

Axes: `E` epochs, `P` clips, `d` width.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor

from ask_lightning.callbacks import QueryTable
from ask_lightning.callbacks.publish import output_folder
from ask_lightning.callbacks.schedule import is_due_after_epoch
from ask_lightning.encoding.probe import encode_probe, select_probe
from ask_lightning.functional import representation_drift
from ask_lightning.losses import NTXentLoss, ReliabilityOTLoss
from ask_lightning.reproduce.artifacts.artifact import SOURCE, Artifact, write_figure, write_table
from ask_lightning.reproduce.artifacts.entries import ASK, NT_XENT
from ask_lightning.reproduce.artifacts.plots import BASELINE_COLOR, COLORS, new_figure
from ask_lightning.reproduce.methods import LossVariant
from ask_lightning.reproduce.run_table import Run
from ask_lightning.reproduce.study import Entry, Study, Trained
from ask_lightning.reproduce.tasks.task import Task
from ask_lightning.utilities.atomic_files import atomic_write
from ask_lightning.utilities.optional_imports import import_optional
from ask_lightning.utilities.text_tables import Cell

_NEVER = 10**6  # so that a callback acts after the first and the last epoch only
_NUM_CLIPS = 64
_PAPER_RELIABILITY = (
    ("thunder query, clean", 1.60, 0.91),
    ("thunder query, noise", 1.05, 0.99),
    ("motorboat query, clean", 1.55, 0.91),
    ("motorboat query, noise", 1.08, 0.98),
)
"""The paper's Table 6: neighbourhood, Ψ, factor."""


class ProbeEmbeddings(Callback):
    """Writes the embeddings of the same validation clips after each epoch to `probe.safetensors`.

    Args:
        num_clips: P, the number of clips.
    """

    def __init__(self, num_clips: int = _NUM_CLIPS) -> None:
        self.num_clips = num_clips
        self._embeddings: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encodes the clips, and writes the file after the last epoch."""
        probe = select_probe(trainer, self.num_clips)
        if probe is None:
            raise RuntimeError("ProbeEmbeddings needs validation data with an index.")
        for side, rows in zip(
            ("audio", "text"), encode_probe(trainer, pl_module, *probe, None, None), strict=True
        ):
            self._embeddings[f"{side}/{trainer.current_epoch}"] = rows.cpu().contiguous()  # (P, d)
        if is_due_after_epoch(trainer, _NEVER):
            with atomic_write(output_folder(trainer) / "probe.safetensors") as path:
                save_file(self._embeddings, path)


OBSERVED = Entry(
    "ASK, observed",
    LossVariant(
        ReliabilityOTLoss,
        ASK.variant.grid,
        callbacks=(ProbeEmbeddings, partial(QueryTable, every_n_epochs=_NEVER)),
    ),
    like=ASK,
    one_seed=True,
)
"""ASK of the first seed with its chosen settings, whose clips and queries are written down."""

OBSERVED_NT_XENT = Entry(
    "NT-Xent, observed",
    LossVariant(NTXentLoss, NT_XENT.variant.grid, callbacks=(ProbeEmbeddings,)),
    like=NT_XENT,
    one_seed=True,
)
"""The same for NT-Xent."""


class DriftFigure(Artifact):
    """Figure 6: where the same clips are after each epoch, by PCA of the first epoch and by t-SNE."""

    def __init__(self) -> None:
        super().__init__("figure6", "the embeddings of the same clips over training")

    def entries(self, task: Task) -> Sequence[Entry]:
        """One observed run of ASK and one of NT-Xent.

        Args:
            task: The task.
        """
        return [OBSERVED, OBSERVED_NT_XENT]

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the figure, and the drift from the first epoch on as a table."""
        figure = new_figure(13, 7.5)
        axes = figure.subplots(2, 3)
        drifts: dict[str, dict[str, list[float]]] = {}
        observed = (("ASK", OBSERVED, COLORS[0]), ("NT-Xent", OBSERVED_NT_XENT, BASELINE_COLOR))
        for name, entry, color in observed:
            stored = load_file(trained[entry.name].runs[0].file("probe.safetensors"))
            for row, side in enumerate(("audio", "text")):
                embeddings = _by_epoch(stored, side)  # (E, P, d)
                drifts.setdefault(side, {})[name] = drift = _drift_from_first(embeddings)
                axes[row, 2].plot(range(len(drift)), drift, color=color, label=name)
                if entry is OBSERVED:
                    shown = _spread(len(embeddings), 6)
                    _draw_places(axes[row, 0], _first_plane(embeddings)[shown], shown)
                    _draw_places(axes[row, 1], _tsne(embeddings[shown]), shown)
                    axes[row, 0].set_title(f"ASK, {side}: PCA of the first epoch")
                    axes[row, 1].set_title(f"ASK, {side}: t-SNE")
        for row, side in enumerate(("audio", "text")):
            axes[row, 2].set(title=f"{side}: RDM since the first epoch", xlabel="epoch", ylabel="nats")
            axes[row, 2].grid(alpha=0.3)
            axes[row, 2].legend(fontsize=8)
        write_figure(folder, self.name, figure)
        columns = ["embeddings", "method", "RDM of the middle epoch", "RDM of the last epoch"]
        rows: list[list[Cell]] = [
            [side, name, f"{drift[len(drift) // 2]:.4f}", f"{drift[-1]:.4f}"]
            for side, by_method in drifts.items()
            for name, drift in by_method.items()
        ]
        text = write_table(folder, self.name, columns, rows) + (
            f"\n\n{_NUM_CLIPS} validation clips at most, first seed, in nats against what they were after "
            "the first epoch (Eq. 4)."
        )
        return text


class QueryTables(Artifact):
    """Tables 3 and 6: what queries retrieve, and how reliable ASK finds it.

    Args:
        name: `"table3"` or `"table6"`.
    """

    def __init__(self, name: str) -> None:
        titles = {
            "table3": "knowledge that queries retrieve",
            "table6": "the reliability of retrieved and of random neighbours",
        }
        super().__init__(name, titles[name])

    def entries(self, task: Task) -> Sequence[Entry]:
        """One observed run of ASK.

        Args:
            task: The task.
        """
        return [OBSERVED]

    def _make(self, study: Study, trained: Mapping[str, Trained], folder: Path) -> str:
        """Write the table."""
        queries = _last_queries(trained[OBSERVED.name].runs[0], study.task.max_epochs)
        make = self._retrieved if self.name == "table3" else self._reliability
        return make(queries, folder)

    def _retrieved(self, queries: Sequence[Mapping[str, str]], folder: Path) -> str:
        columns = ["query", "direction", "retrieved by audio", "retrieved by text"]
        return write_table(folder, self.name, columns, [[row[name] for name in columns] for row in queries])

    def _reliability(self, queries: Sequence[Mapping[str, str]], folder: Path) -> str:
        rows: list[list[Cell]] = [[*line, "paper"] for line in _PAPER_RELIABILITY]
        kinds = (("retrieved", "psi_fine", "factor"), ("random", "psi_fine of noise", "factor of noise"))
        for kind, potential, factor in kinds:
            for direction in sorted({row["direction"] for row in queries}):
                own = [row for row in queries if row["direction"] == direction]
                means = [statistics.fmean(float(row[name]) for row in own) for name in (potential, factor)]
                rows.append([f"{kind} neighbours, {direction}, mean of {len(own)}", *means, "ours"])
        columns = ["neighbourhood", "Ψ, fine", "factor", "source"]
        cells = [[cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row] for row in rows]
        return f"{write_table(folder, self.name, columns, cells)}\n\nThe paper's lines are from {SOURCE}."


def _by_epoch(stored: Mapping[str, Tensor], side: str) -> Tensor:
    """The embeddings of a modality in the order of the epochs, `(E, P, d)`."""
    epochs = sorted(int(name.split("/")[1]) for name in stored if name.startswith(side))
    return torch.stack([stored[f"{side}/{epoch}"].float() for epoch in epochs])


def _drift_from_first(embeddings: Tensor) -> list[float]:
    """RDM of each epoch against the first, E values."""
    return [float(representation_drift(now, now, embeddings[0])) for now in embeddings]


def _first_plane(embeddings: Tensor) -> Tensor:
    """Coordinates on the two principal components of the first epoch, `(E, P, 2)`."""
    centre = embeddings[0].mean(dim=0)
    _, _, directions = torch.linalg.svd((embeddings[0] - centre).double(), full_matrices=False)
    places: Tensor = (embeddings - centre).double() @ directions[:2].T
    return places


def _tsne(embeddings: Tensor) -> Tensor:
    """t-SNE of all embeddings together, `(E, P, 2)`."""
    flat = embeddings.flatten(0, 1)  # (E P, d)
    perplexity = min(30.0, (len(flat) - 1) / 3)
    tsne = import_optional("sklearn.manifold").TSNE(
        perplexity=perplexity, init="pca", learning_rate="auto", random_state=0
    )
    places = torch.from_numpy(tsne.fit_transform(flat.numpy()))
    by_epoch: Tensor = places.unflatten(0, embeddings.shape[:2])
    return by_epoch


def _spread(count: int, most: int) -> list[int]:
    """Evenly spaced places from the first to the last."""
    return sorted(set(torch.linspace(0, count - 1, min(count, most)).round().int().tolist()))


def _draw_places(axis: Any, places: Tensor, epochs: Sequence[int]) -> None:
    """Draw where clips are, a color for each epoch, with a line along the way of each clip."""
    colors = import_optional("matplotlib").colormaps["viridis"]
    axis.plot(*places.permute(2, 0, 1).numpy(), color="#bbbbbb", linewidth=0.4, zorder=1)
    for number, epoch in enumerate(epochs):
        color = colors(number / max(1, len(epochs) - 1))
        axis.scatter(*places[number].T.numpy(), s=9, color=color, label=f"epoch {epoch}", zorder=2)
    axis.set(xticks=[], yticks=[])
    axis.legend(fontsize=7)


def _last_queries(run: Run, max_epochs: int) -> list[dict[str, str]]:
    """The lines that `QueryTable` wrote after the last epoch."""
    table = run.file(f"queries-epoch-{max_epochs - 1}.csv")
    with open(table, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
