"""`DriftMap`: the embeddings of the same clips over epochs (paper Figure 6). Axes: `E` epochs, `P` clips."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Subset

from ask_lightning.callbacks.publish import output_folder, publish_picture, publish_table
from ask_lightning.callbacks.schedule import is_due_after_epoch
from ask_lightning.encoding.probe import check_encoders, encode_probe, select_probe
from ask_lightning.encoding.source_identity import dataset_of, source_key
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.optional_imports import import_optional

_COLUMNS = ("epoch", "modality", "clip", "x", "y")


class DriftMap(Callback):
    """Draws how the embeddings of the same clips move while the encoders train.

    A few validation pairs are encoded after the first epoch, after every `every_n_epochs` epochs and after
    the last one. All these embeddings are projected onto their two principal components. `drift_map.png` and
    `drift_map.csv` are written to the folder of the run and shown in Weights & Biases and TensorBoard. The
    paper uses t-SNE, which preserves neighbourhoods; a linear projection preserves the distances by which
    drift is measured.

    The callback works with and without ASK. If there are no validation data, or no matplotlib, it warns. A
    run that goes on with other validation pairs, or another order of them, begins a new map, with a warning.

    Args:
        every_n_epochs: Number of epochs between maps, at least 1.
        num_clips: Number of pairs on the map, at least 2; all pairs if there are fewer.
        audio: Name of the module's method that takes a batch and returns audio embeddings. None: found by
            the rule of `ASKModule`.
        text: Name of the module's method that takes a batch and returns text embeddings. None: found by the
            rule of `ASKModule`.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> DriftMap(every_n_epochs=5).num_clips
        64
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        num_clips: int = 64,
        *,
        audio: str | None = None,
        text: str | None = None,
    ) -> None:
        check_count("every_n_epochs", every_n_epochs, 1)
        check_count("num_clips", num_clips, 2)
        self.every_n_epochs = every_n_epochs
        self.num_clips = num_clips
        self.audio = audio
        self.text = text
        self._embeddings: dict[int, Tensor] = {}  # epoch → (2, P, d), audio and text
        self._pairs = ""  # which pairs these are

    @property
    def state_key(self) -> str:
        """The key of this map in a checkpoint, which distinguishes it from other maps."""
        return self._generate_state_key(audio=self.audio, text=self.text, every_n_epochs=self.every_n_epochs)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the model has the two encoders."""
        if stage != "fit":
            return
        check_encoders(pl_module, self, self.audio, self.text)
        if trainer.current_epoch == 0:
            self._embeddings = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encodes the clips and draws the map again."""
        if not is_due_after_epoch(trainer, self.every_n_epochs):
            return
        probe = select_probe(trainer, self.num_clips)
        if probe is None:
            rank_zero_warn("DriftMap draws nothing, because there are no validation data with an index.")
            return
        pairs = _checksum(probe[0])
        if self._embeddings and pairs != self._pairs:
            rank_zero_warn(
                "The validation pairs, or their order, are others than in the epochs before, so DriftMap "
                "begins a new map."
            )
            self._embeddings = {}
        self._pairs = pairs
        sides = encode_probe(trainer, pl_module, *probe, self.audio, self.text)
        self._embeddings[trainer.current_epoch] = torch.stack(sides).cpu()  # (2, P, d)
        folder = output_folder(trainer)
        if len(self._embeddings) > 1:
            self._publish(trainer, folder)

    def _publish(self, trainer: pl.Trainer, folder: Path) -> None:
        """Project all embeddings, and write the table and the picture."""
        epochs = list(self._embeddings)
        maps = {}
        rows = []
        for side, modality in enumerate(("audio", "text")):
            stacked = torch.stack([self._embeddings[epoch][side] for epoch in epochs])  # (E, P, d)
            maps[modality] = places = project_to_plane(stacked.flatten(0, 1)).unflatten(
                0, stacked.shape[:2]
            )  # (E, P, 2)
            rows += [
                (epoch, modality, clip, *(round(place, 6) for place in places[number, clip].tolist()))
                for number, epoch in enumerate(epochs)
                for clip in range(places.shape[1])
            ]
        publish_table(trainer, folder, "drift_map", _COLUMNS, rows)
        try:
            figure = draw_map(maps, epochs)
        except ImportError:
            rank_zero_warn(
                'DriftMap writes its table only; pictures need: pip install "ask-lightning[plot]".'
            )
            return
        publish_picture(trainer, folder, "drift_map", figure)

    def state_dict(self) -> dict[str, Any]:
        """The embeddings of past epochs, so that a resumed run continues its map."""
        return {
            "epochs": list(self._embeddings),
            "embeddings": list(self._embeddings.values()),
            "pairs": self._pairs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the embeddings of an interrupted run."""
        self._embeddings = dict(zip(state_dict["epochs"], state_dict["embeddings"], strict=True))
        self._pairs = state_dict.get("pairs", "")


def _checksum(items: Subset[Any]) -> str:
    """What tells pairs apart without reading them: number and place, and of this library's data the clips."""
    digest = blake2b(str(source_key(items)).encode(), digest_size=8)
    for clip in getattr(dataset_of(items), "clips", ()):
        for text in (getattr(clip, "key", None), *(getattr(clip, "captions", ()))):
            if isinstance(text, str):
                digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def project_to_plane(embeddings: Tensor) -> Tensor:
    """Project embeddings onto their two principal components.

    Args:
        embeddings: Embeddings `(n, d)`.

    Returns:
        Centred coordinates `(n, 2)`. In each component the entry of largest magnitude is positive.

    Examples:
        >>> project_to_plane(torch.tensor([[0.0, 3.0], [0.0, -3.0], [1.0, 0.0], [-1.0, 0.0]])).abs().tolist()
        [[3.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    centred = embeddings.double() - embeddings.double().mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    places = centred @ directions[:2].T  # (n, 2) or fewer columns
    places = torch.nn.functional.pad(places, (0, 2 - places.shape[1]))
    # Fix the signs, or the map could be mirrored from one epoch to the next.
    largest = places.gather(0, places.abs().argmax(dim=0, keepdim=True))  # (1, 2)
    return (places * torch.where(largest < 0, -1.0, 1.0)).float()


def draw_map(maps: dict[str, Tensor], epochs: list[int]) -> Any:
    """Draw the map.

    Args:
        maps: Coordinates `(E, P, 2)` by modality.
        epochs: Numbers of the E epochs, counted from 0.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = import_optional("matplotlib.figure").Figure(figsize=(10, 4.5), layout="constrained")
    colors = import_optional("matplotlib").colormaps["viridis"]
    for axis, (modality, places) in zip(figure.subplots(1, 2), maps.items(), strict=True):
        axis.plot(*places.permute(2, 0, 1).numpy(), color="#bbbbbb", linewidth=0.5, zorder=1)
        for number, epoch in enumerate(epochs):
            color = colors(number / max(1, len(epochs) - 1))
            axis.scatter(*places[number].T.numpy(), s=12, color=color, label=f"epoch {epoch}", zorder=2)
        axis.set(title=f"{modality}: the same clips over training", xticks=[], yticks=[])
    axis.legend(fontsize=8)
    return figure
