"""`SearchCalibration`: a test reports calibrated search beside search by cosine similarity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from ask_lightning.callbacks.progress import progress_bar
from ask_lightning.encoding.batch_parts import entry_of
from ask_lightning.encoding.encode import Encoded, encode_source
from ask_lightning.encoding.encoders import find_pair_encoder
from ask_lightning.encoding.source_loader import Source, source_loader
from ask_lightning.losses.base import Ids
from ask_lightning.metrics import AudioTextRetrieval, Calibration, QueryBank, choose_calibration
from ask_lightning.utilities.distributed import Ranks


class SearchCalibration(Callback):
    """Chooses the calibration of search before a test, for the metrics of the model that is tested.

    At the start of `test` the training pairs are encoded, which are the bank, and the validation pairs, on
    which kind and parameters are chosen; then every `AudioTextRetrieval` of the module reports both searches
    until the test ends. The test pairs choose nothing, and each of them is calibrated by itself. On several
    ranks each encodes its share.

    References:
        Hubs and banks of queries: `ask_lightning.functional.calibration.hub_bias` and `find_hubs`.

    Requirements:
        A module that computes an `AudioTextRetrieval` in its test, with encoders that `find_pair_encoder`
        finds.

    Recommendations:
        It costs one pass over the training split and one over the validation split with each test. Leave it
        out where only recall by cosine similarity is of interest.

    Args:
        training: Training pairs without augmentation: a Dataset, a DataLoader, or a callable that returns
            one. A Dataset is read with batch size, collation and workers of the test's loader. None:
            `ordered_dataloader("train")` of the trainer's data module.
        validation: Validation pairs, in the same way. None: `ordered_dataloader("val")`.
        ids: The key of the clip ids in a batch that is a mapping, their position in one that is a tuple, or a
            callable `(module, batch)`, such as the one that an `ASKModule` has for its `ids`.

    Attributes:
        calibration: Kind and parameters that the last test used, or None.
        bank: The training pairs by which the last test was calibrated, or None.

    Examples:
        >>> SearchCalibration().calibration is None
        True
    """

    def __init__(
        self,
        training: Source | None = None,
        validation: Source | None = None,
        ids: str | int | Callable[[Any, Any], Ids] = "clip_id",
    ) -> None:
        self.training = training
        self.validation = validation
        self.ids = ids
        self.calibration: Calibration | None = None
        self.bank: QueryBank | None = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encodes the bank and the validation pairs, chooses, and tells the metrics."""
        self.calibration = self.bank = None
        metrics = _metrics(pl_module)
        if not metrics:
            raise RuntimeError(
                "SearchCalibration needs a module with an AudioTextRetrieval, but "
                f"{type(pl_module).__name__} has none. Add the metric as an attribute, or leave the "
                "callback out."
            )
        if any(metric.interaction is not None for metric in metrics):
            rank_zero_info("Calibrated search is left out, because the model compares tokens.")
            return
        ranks = Ranks.current()
        with ranks.all_or_none("opening the training and the validation pairs"):
            sources = {"train": self.training, "val": self.validation}
            template = _first_loader(trainer)
            loaders = [
                source_loader(_ordered(trainer, split) if source is None else source, template, ranks=ranks)
                for split, source in sources.items()
            ]
        encode = find_pair_encoder(pl_module)

        def embed(batch: Any) -> tuple[Tensor, Tensor, Any]:
            return (*encode(batch), self._ids_of(pl_module, batch))

        with progress_bar(trainer, "Encoding for calibrated search", None) as advance:
            training, validation = (
                encode_source(trainer, pl_module, loader, embed, advance, ranks=ranks) for loader in loaders
            )
        self.bank = bank = QueryBank.from_pairs(*_of_all_ranks(training))
        chosen = choose_calibration(*_of_all_ranks(validation), bank)
        # The first rank decides, should another device round otherwise.
        (self.calibration, *_) = ranks.all_gather_object(chosen)
        for metric in metrics:
            metric.calibrate(bank, self.calibration)
        rank_zero_info(
            f"Calibrated search: {self.calibration}, chosen on the validation split; the bank is "
            f"{len(bank.audio)} training clips with {len(bank.text)} captions."
        )

    def _ids_of(self, module: pl.LightningModule, batch: Any) -> Any:
        """The clip ids of a batch."""
        if not isinstance(self.ids, str | int):
            return self.ids(module, batch)
        kinds = "a key of the batch or position in it, or a callable (module, batch)"
        rule = f"Argument `ids` of SearchCalibration has to be {kinds}"
        return entry_of(batch, self.ids, rule)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets the metrics report search by cosine similarity alone again."""
        for metric in _metrics(pl_module):
            metric.calibrate(None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Does so after an error as well."""
        if trainer.testing:
            self.on_test_end(trainer, pl_module)


def _metrics(module: torch.nn.Module) -> list[AudioTextRetrieval]:
    """The retrieval metrics of a module."""
    return [part for part in module.modules() if isinstance(part, AudioTextRetrieval)]


def _first_loader(trainer: pl.Trainer) -> object:
    """The first loader of the test."""
    loaders = trainer.test_dataloaders
    return loaders[0] if isinstance(loaders, list | tuple) else loaders


def _ordered(trainer: pl.Trainer, split: str) -> Any:
    """The ordered loader of a split of the trainer's data module."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not callable(ordered := getattr(datamodule, "ordered_dataloader", None)):
        argument = {"train": "training", "val": "validation"}[split]
        raise ValueError(
            f"SearchCalibration does not know where to find the {argument} pairs: the trainer has no data "
            f"module with `ordered_dataloader`. Pass SearchCalibration({argument}=dataset)."
        )
    return ordered(split)


def _of_all_ranks(part: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """Audio, text and clip ids of all pairs, on a device that has float64."""
    assert part.ids is not None
    sides = (part.shard.gather(side.to(part.audio.device)) for side in (part.audio, part.text, part.ids))
    audio, text, ids = (side.cpu() if side.device.type == "mps" else side for side in sides)
    return audio, text, ids
