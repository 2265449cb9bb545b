"""Loaders over datasets that a process loads once, whatever the seed of the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from ask_lightning.data import RetrievalDataModule

Parts = Mapping[str, Dataset[dict[str, Any]]]


class LoadedData(RetrievalDataModule):
    """Loaders over datasets that a function loads. Unlike other data modules it may lack training pairs.

    Args:
        load: Function that returns datasets by name, `"train"`, `"val"` or `"test"`; with a cache of its own
            all data modules of a process share them.
        seed: Seed of the shuffles, at least 0.
        batch_size: Number of pairs in a batch, at least 2.
        num_workers: Number of worker processes of each loader.

    Examples:
        >>> from ask_lightning.data import Soundscapes
        >>> data = LoadedData(lambda: {"test": Soundscapes(4, split="test", seconds=1)}, batch_size=2)
        >>> len(data.test_dataloader())
        2
    """

    def __init__(
        self, load: Callable[[], Parts], seed: int = 0, *, batch_size: int = 32, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self._load = load

    def build(self) -> Parts:
        """Load the datasets, or take those that are loaded already."""
        return self._load()
