"""`QueryTable`: knowledge that queries retrieve, and its Ψ (paper Tables 3, 6). Axes: `Q` queries."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ask_lightning.callbacks.publish import Sound, output_folder, publish_sounds, publish_table
from ask_lightning.callbacks.refresh import find_refresher
from ask_lightning.callbacks.schedule import is_due_after_epoch
from ask_lightning.encoding.probe import check_encoders, encode_probe, select_probe
from ask_lightning.encoding.source_loader import has_index
from ask_lightning.encoding.target import reliability_loss
from ask_lightning.knowledge.base import GranularityName, KnowledgeBase
from ask_lightning.knowledge.pairs import Neighborhood, PairStore, read_neighborhood
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from ask_lightning.losses.reliability_weighting import DIRECTIONS, Potentials
from ask_lightning.utilities.arguments import check_count

_COLUMNS = (
    "query",
    "direction",
    "retrieved by audio",
    "retrieved by text",
    "psi_fine",
    "psi_coarse",
    "factor",
    "psi_fine of noise",
    "factor of noise",
)


class QueryTable(Callback):
    """Tabulates which knowledge a few validation pairs retrieve, and how reliable ASK finds it.

    The table has a row for each pair and direction: the pair's caption, the captions of the knowledge pairs
    that its audio and its text retrieve (paper Table 3), the reliability potentials Ψ and the modulation
    factor (Table 6), and Ψ and factor for random neighbours in place of the retrieved ones. The table is
    written as `queries-epoch-N.csv`, and the clips as `query-N.wav`, to the folder of the run. Weights &
    Biases shows the table with clips to play, TensorBoard the table and the clips.

    Requirements:
        `KnowledgeRefreshCallback`, and validation data with an index. Captions are shown if the knowledge
        source has an index and its items are mappings with `"caption"`; otherwise row numbers are.

    Args:
        every_n_epochs: Number of epochs between tables, at least 1. The first and the last epoch always have
            a table.
        num_queries: Number of validation pairs, at least 1; all pairs if there are fewer.
        num_shown: Number of neighbours whose captions are shown, at least 1. Ψ is computed from all K.
        audio: Name of the module's method that takes a batch and returns audio embeddings. None: found by
            the rule of `ASKModule`.
        text: Name of the module's method that takes a batch and returns text embeddings. None: found by the
            rule of `ASKModule`.

    Raises:
        ValueError: An argument is out of range.

    Examples:
        >>> QueryTable(num_queries=8).every_n_epochs
        10
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        num_queries: int = 6,
        num_shown: int = 3,
        *,
        audio: str | None = None,
        text: str | None = None,
    ) -> None:
        check_count("every_n_epochs", every_n_epochs, 1)
        check_count("num_queries", num_queries, 1)
        check_count("num_shown", num_shown, 1)
        self.every_n_epochs = every_n_epochs
        self.num_queries = num_queries
        self.num_shown = num_shown
        self.audio = audio
        self.text = text
        self._sounds_written = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the trainer has knowledge and that the model has the two encoders."""
        if stage == "fit":
            find_refresher(trainer, self)
            check_encoders(pl_module, self, self.audio, self.text)
            self._sounds_written = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that there are neighbours to show."""
        reliability_loss(find_refresher(trainer, self).target, self)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the table with the knowledge in use."""
        if not is_due_after_epoch(trainer, self.every_n_epochs):
            return
        refresher = find_refresher(trainer, self)
        loss = reliability_loss(refresher.target, self)
        base = loss.knowledge
        probe = select_probe(trainer, self.num_queries)
        if probe is None or base is None or base.is_sharded:
            rank_zero_warn(
                "QueryTable writes nothing: it needs validation data with an index, and knowledge that every "
                "process holds as a whole."
            )
            return
        items, loader = probe
        audio, text = encode_probe(trainer, pl_module, items, loader, self.audio, self.text)
        audio, text = audio.to(base.device), text.to(base.device)
        neighborhoods = loss.retrieve(audio, text, base)
        folder = output_folder(trainer)
        if not trainer.is_global_zero:
            return
        source = _captioned_source(refresher.loader(trainer), base)
        pairs = [items[row] for row in range(len(items))]
        table = _QueryAnswers(loss, base, source, audio, text, neighborhoods).rows(pairs, self.num_shown)
        sounds = [_waveform(pair, pl_module) for pair in pairs]
        name = f"queries-epoch-{trainer.current_epoch}"
        has_sounds = any(sound is not None for sound in sounds)
        row_sounds = [sound for sound in sounds for _ in DIRECTIONS] if has_sounds else None
        publish_table(trainer, folder, name, _COLUMNS, table, sounds=row_sounds)
        if not self._sounds_written:
            publish_sounds(trainer, folder, "query", [sound for sound in sounds if sound is not None])
            self._sounds_written = True


class _QueryAnswers:
    """The neighbours of Q queries in a knowledge base, with Ψ and factor under the options of a loss."""

    def __init__(
        self,
        loss: ReliabilityOTLoss,
        base: KnowledgeBase,
        source: Dataset[Any] | None,
        audio: Tensor,
        text: Tensor,
        neighborhoods: dict[Any, Neighborhood],
    ) -> None:
        self.source, self.neighborhoods = source, neighborhoods
        self.loss = loss
        noise = {name: _random_pairs(base, name, neighbors) for name, neighbors in neighborhoods.items()}
        self.psi, self.factor = self._reliability(audio, text, neighborhoods)
        self.noise_psi, self.noise_factor = self._reliability(audio, text, noise)

    def _reliability(
        self, audio: Tensor, text: Tensor, neighborhoods: dict[Any, Neighborhood]
    ) -> tuple[Potentials, dict[str, Tensor]]:
        """Ψ by granularity and direction, and the factor by direction, if there is one: `(Q,)` each."""
        psi: dict[tuple[GranularityName, str], Tensor] = {}
        for name, stored in neighborhoods.items():
            potentials = stored.to(audio.dtype).potentials(audio, text)
            psi |= {(name, direction): values for direction, values in potentials.items()}
        return psi, self.loss.weighting.factors(psi)

    def rows(self, pairs: list[Any], num_shown: int) -> list[tuple[str | float, ...]]:
        """The rows of the table, one for each query and direction."""
        rows: list[tuple[str | float, ...]] = []
        fine = self.neighborhoods.get("fine")
        for query, pair in enumerate(pairs):
            by_audio = self._captions(None if fine is None else fine.audio_rows[query, :num_shown])
            by_text = self._captions(None if fine is None else fine.text_rows[query, :num_shown])
            caption = (
                str(pair["caption"]) if isinstance(pair, dict) and "caption" in pair else f"pair {query}"
            )
            for direction in DIRECTIONS:
                numbers = (
                    self.psi.get(("fine", direction)),
                    self.psi.get(("coarse", direction)),
                    self.factor.get(direction),
                    self.noise_psi.get(("fine", direction)),
                    self.noise_factor.get(direction),
                )
                cells = ["" if one is None else round(float(one[query]), 4) for one in numbers]
                rows.append((caption, direction.upper(), by_audio, by_text, *cells))
        return rows

    def _captions(self, rows: Tensor | None) -> str:
        """The captions of knowledge pairs, in one cell."""
        if rows is None:
            return ""
        if self.source is None:
            return " · ".join(f"row {row}" for row in rows.tolist())
        return " · ".join(str(self.source[row]["caption"]) for row in rows.tolist())


def _random_pairs(base: KnowledgeBase, name: Any, retrieved: Neighborhood) -> Neighborhood:
    """Random pairs, as many as were retrieved."""
    generator = torch.Generator().manual_seed(0)
    pairs: PairStore = getattr(base, name)
    by_audio, by_text = (
        torch.randint(len(pairs), rows.shape, generator=generator).to(rows.device)
        for rows in (retrieved.audio_rows, retrieved.text_rows)
    )
    return read_neighborhood(pairs, by_audio, by_text)


def _captioned_source(loader: Any, base: KnowledgeBase) -> Dataset[Any] | None:
    """The dataset of the knowledge source, if its items are the pairs of the base and have captions."""
    if not (isinstance(loader, DataLoader) and has_index(loader)):
        return None
    dataset: Dataset[Any] = loader.dataset
    if len(dataset) != len(base.fine):  # type: ignore[arg-type]
        return None
    first = dataset[0]
    return dataset if isinstance(first, dict) and "caption" in first else None


def _waveform(pair: Any, module: pl.LightningModule) -> Sound | None:
    """The waveform of a pair and its sample rate, if both are known."""
    rate = module.hparams.get("sample_rate")
    waveform = pair.get("waveform") if isinstance(pair, dict) else None
    if rate is None or waveform is None:
        return None
    length = int(pair.get("num_samples", len(waveform)))
    return waveform[:length].float().numpy(), int(rate)
