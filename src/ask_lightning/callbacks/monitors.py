"""Monitors of the two quantities that the paper defines, RDM and OBI, while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.hooks import RemovableHandle

from ask_lightning.callbacks.refresh import find_refresher
from ask_lightning.encoding.encode import encode_source
from ask_lightning.encoding.source_loader import has_index, source_loader
from ask_lightning.encoding.target import find_target, reliability_loss
from ask_lightning.functional import out_of_batch_influence, representation_drift, unit_length
from ask_lightning.interaction import Embeddings, pooled, unit_embeddings
from ask_lightning.knowledge.base import KnowledgeBase
from ask_lightning.losses.base import Ids
from ask_lightning.losses.reliability_ot import ReliabilityOTLoss
from ask_lightning.utilities.arguments import check_count
from ask_lightning.utilities.clip_ids import integer_ids
from ask_lightning.utilities.distributed import Ranks
from ask_lightning.utilities.dtypes import computation_dtype
from ask_lightning.utilities.evenly_spaced import evenly_spaced


class DriftMonitor(Callback):
    """Logs how far the encoders have moved from the knowledge, at the end of each epoch.

    RDM (Eq. 4) per modality on a fixed, evenly spaced probe of the knowledge source: the probe's current
    embeddings against its stored ones, as `ask/probe_rdm_audio` and `ask/probe_rdm_text`. The measure at a
    refresh, over the whole source, is logged by the refresh itself as `ask/rdm_audio` and `ask/rdm_text`.

    Requirements:
        `KnowledgeRefreshCallback` with a map-style source.

    Args:
        num_probes: Number of pairs in the probe, at least 2; all pairs if the source has fewer.

    Raises:
        RuntimeError: At the start of training, without the refresh callback or a map-style source.

    Examples:
        >>> DriftMonitor(num_probes=256).num_probes
        256
    """

    def __init__(self, num_probes: int = 256) -> None:
        check_count("num_probes", num_probes, 2)
        self.num_probes = num_probes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that the trainer has a refresh callback."""
        if stage == "fit":
            find_refresher(trainer, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that single rows of the source can be read again."""
        _map_style_dataset(find_refresher(trainer, self).loader(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encodes the probe and logs its drift."""
        refresher = find_refresher(trainer, self)
        target, whole = refresher.target, refresher.loader(trainer)
        dataset = _map_style_dataset(whole)
        base = target.loss.knowledge
        assert base is not None
        items: int = len(dataset)  # type: ignore[arg-type]
        if (most := refresher.max_items(trainer)) is not None:
            items = min(items, most)
        if len(base.fine) != items:
            raise RuntimeError(
                f"DriftMonitor needs one pair for each item of the knowledge source, but {items} items made "
                f"{len(base.fine)} pairs. Let the dataset yield pairs, or leave the monitor out."
            )
        rows = evenly_spaced(items, self.num_probes)
        # Every rank encodes the whole probe: it is small, and all of them log the same.
        loader = source_loader(Subset(dataset, rows.tolist()), whole)
        probe = encode_source(trainer, pl_module, loader, target.embed)
        stored_audio, stored_text = base.fine.pairs(rows.to(base.device))
        for side, embeddings, stored in (
            ("audio", probe.audio, stored_audio),
            ("text", probe.text, stored_text),
        ):
            current = unit_length(embeddings)
            drift = representation_drift(current, current, stored.to(current))
            pl_module.log(f"ask/probe_rdm_{side}", drift, sync_dist=True)


class InfluenceMonitor(Callback):
    """Logs how strongly pairs outside the batch influence the loss, every few steps.

    OBI (Eq. 2) per granularity as `ask/obi_fine` and `ask/obi_coarse`: 0 for a loss that sees its batch
    only. It is measured on detached embeddings after the training step's own forward pass, so the gradients
    of the step are untouched.

    Args:
        every_n_steps: Number of optimiser steps from one measurement to the next, at least 1; each costs
            about one more evaluation of the loss.
        per_epoch: Whether to log the mean of each epoch's measurements instead of each of them.

    Examples:
        >>> InfluenceMonitor(every_n_steps=50).every_n_steps
        50
    """

    def __init__(self, every_n_steps: int = 50, *, per_epoch: bool = False) -> None:
        check_count("every_n_steps", every_n_steps, 1)
        self.every_n_steps = every_n_steps
        self.per_epoch = per_epoch
        self._due = False
        self._last_step = -1
        self._measured: dict[str, Tensor] = {}
        self._hook: RemovableHandle | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Registers a forward hook on the loss, which has to be a `ReliabilityOTLoss`."""
        self._last_step = -1
        loss = reliability_loss(find_target(pl_module), self)
        self._hook = loss.register_forward_hook(self._measure, with_kwargs=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Removes the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Removes the hook; Lightning does not call `teardown` after an error."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decides whether to measure this step."""
        # Several batches belong to one optimiser step when gradients are accumulated.
        step = trainer.global_step
        self._due = step % self.every_n_steps == 0 and step != self._last_step
        if self._due:
            self._last_step = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what was measured."""
        measured, self._measured, self._due = self._measured, {}, False
        if measured:
            pl_module.log_dict(measured, batch_size=1, on_step=not self.per_epoch, on_epoch=self.per_epoch)

    def _measure(
        self, loss: nn.Module, embeddings: tuple[Embeddings, ...], named: dict[str, Any], value: Tensor
    ) -> None:
        """Measure one evaluation of the loss; a forward hook."""
        if not self._due or not loss.training:
            return
        assert isinstance(loss, ReliabilityOTLoss)
        arguments = dict(zip(("audio", "text"), embeddings, strict=False)) | named
        influences = influence_of_knowledge(loss, **arguments)
        self._measured = {f"ask/obi_{name}": influence for name, influence in influences.items()}


def influence_of_knowledge(
    loss: ReliabilityOTLoss,
    audio: Embeddings,
    text: Embeddings,
    *,
    ids: Ids | None = None,
    knowledge: KnowledgeBase | None = None,
) -> dict[str, Tensor]:
    """OBI (Eq. 2) of a batch under a loss, for each granularity.

    Args:
        loss: The loss whose dependence on knowledge is measured.
        audio: Audio embeddings `(B, d)`, with those of tokens or without; normalised here.
        text: Text embeddings of the same kind; row i of both is pair i.
        ids: B clip identifiers, where the loss needs them.
        knowledge: The base to look up; default: that of the loss.

    Returns:
        The influence of each granularity, 0-d.
    """
    knowledge = knowledge if knowledge is not None else loss.knowledge
    assert knowledge is not None
    device = pooled(audio).device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        dtype = computation_dtype(pooled(audio))
        audio, text = (unit_embeddings(side.detach(), dtype) for side in (audio, text))
        id_tensor = None if ids is None else integer_ids(ids).to(device)
        retrieved = loss.retrieve(pooled(audio), pooled(text), knowledge, ids=id_tensor)
        bounded = loss.is_bounded(knowledge)
        targets = loss.targets(id_tensor, knowledge, dtype)
        if loss.gather:  # every rank measures the batch of all ranks, as one process would
            audio, text, _ = loss.compared(audio, text)
            loss = copy(loss)
            loss.gather = False
            id_tensor = None if id_tensor is None else _rows_of_all_ranks(id_tensor)
            retrieved = {
                name: found.map_rows(_rows_of_all_ranks).map_vectors(_rows_of_all_ranks)
                for name, found in retrieved.items()
            }
        neighborhoods = {
            name: found.map_vectors(lambda vectors: vectors.detach().to(dtype).requires_grad_())
            for name, found in retrieved.items()
        }
        value, _ = loss.from_neighborhoods(
            audio, text, neighborhoods, ids=id_tensor, bounded=bounded, targets=targets
        )
        return {
            name: out_of_batch_influence(
                value,
                audio=[(found.audio_rows, found.audio_by_audio), (found.text_rows, found.audio_by_text)],
                text=[(found.audio_rows, found.text_by_audio), (found.text_rows, found.text_by_text)],
                num_rows=len(getattr(knowledge, name)),
            )
            for name, found in neighborhoods.items()
        }


def _rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks in the order of ranks, without gradient."""
    return torch.cat(Ranks.current().all_gather(rows))


def _map_style_dataset(loader: Iterable[Any]) -> Dataset[Any]:
    """The dataset that a loader reads pairs from by number."""
    if isinstance(loader, DataLoader) and has_index(loader) and loader.batch_sampler is not None:
        dataset: Dataset[Any] = loader.dataset
        return dataset
    raise RuntimeError(
        "DriftMonitor needs a knowledge source with an index, but got "
        f"{type(getattr(loader, 'dataset', loader)).__name__}. Pass "
        "KnowledgeRefreshCallback(source=dataset) with a map-style dataset, or leave the monitor out."
    )
