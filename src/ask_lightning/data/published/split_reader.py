"""Reads the annotations of the splits of a published dataset, in each of the supported layouts."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ask_lightning.data.audio.stores import AudioStore
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip
from ask_lightning.data.published.hdf5 import HDF5Store, read_hdf5
from ask_lightning.data.published.locate import SPLIT_WORDS, Layout, find_split, resolve_given_split
from ask_lightning.data.published.parquet import load_hub, read_hub, read_parquet
from ask_lightning.data.splits import SPLITS, Split


class LazyDatasets(Mapping[str, ClipDataset]):
    """Datasets by name, each made when it is first needed.

    Args:
        makers: Function that makes each dataset.

    Examples:
        >>> parts = LazyDatasets({"val": lambda: 1 / 0})
        >>> "val" in parts, list(parts)
        (True, ['val'])
    """

    def __init__(self, makers: Mapping[str, Callable[[], ClipDataset]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, ClipDataset] = {}

    def __getitem__(self, name: str) -> ClipDataset:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class SplitReader:
    r"""Reads the annotations of splits, each once.

    Args:
        root: Folder of the dataset.
        annotations: Path of the annotations of splits, relative to `root` or absolute. Splits that are not
            named are found by name.
        namespace: Namespace of the keys of clips in packed files.
        read_table: Function that reads a CSV or JSON of a split.
        layout: Layout to look for; see `find_split`.
        hub: Name of a dataset of the Hugging Face hub to read instead. None: the files below `root` are read.
        hdf5_sample_rate: Rate of the waveforms in HDF5 files in Hz.

    Examples:
        >>> from ask_lightning.data.published.annotations import read_clotho
        >>> root = getfixture("tmp_path")
        >>> _ = (root / "val.csv").write_text("file_name,caption_1\nRain.wav,rain")
        >>> reader = SplitReader(root, {}, "file", lambda path, split: read_clotho(path))
        >>> reader.names(), reader.read("val")[0][0].key
        (['val'], 'file:rain')
    """

    def __init__(
        self,
        root: Path,
        annotations: Mapping[str, str],
        namespace: str,
        read_table: Callable[[Path, Split], list[Clip]],
        *,
        layout: Layout = "auto",
        hub: str | None = None,
        hdf5_sample_rate: int = 32000,
    ) -> None:
        self._root = root
        self._given = annotations
        self._namespace = namespace
        self._read_table = read_table
        self._layout: Layout = layout
        self._hub = hub
        self._hdf5_sample_rate = hdf5_sample_rate
        self._annotations: dict[str, tuple[list[Clip], AudioStore | None]] = {}

    def names(self) -> list[Split]:
        """The splits that are there: some of `"train"`, `"val"` and `"test"`.

        Raises:
            FileNotFoundError: None is there.
        """
        if self._hub is not None:
            names = [split for split in SPLITS if self._hub_split(split)]
        else:
            names = [split for split in SPLITS if self._find(split)[1]]
        if not names:
            raise FileNotFoundError(
                f"{self._hub or self._root}: no annotations of a split. Looked for CSV, JSON, HDF5 and "
                "parquet files whose names contain train, val, test or other names of these splits. Pass "
                "their paths as `annotations`, by split."
            )
        return names

    def read(self, split: Split) -> tuple[list[Clip], AudioStore | None]:
        """The clips of a split as published, and the store of their audio unless it is in files of its own.

        Args:
            split: One of `names()`.
        """
        if split not in self._annotations:
            self._annotations[split] = self._read(split)
        return self._annotations[split]

    def _read(self, split: Split) -> tuple[list[Clip], AudioStore | None]:
        """Read a split from the hub, or in the layout in which it is on disk."""
        if self._hub is not None:
            name = self._hub_split(split)
            return read_hub(f"{self._hub}, {name}", self._hub_splits[name], self._namespace)
        layout, paths = self._find(split)
        if layout == "hdf5":
            return read_hdf5(paths[0], self._namespace), HDF5Store(paths[0], self._hdf5_sample_rate)
        if layout == "parquet":
            return read_parquet(paths, self._namespace)
        return self._read_table(paths[0], split), None

    def _find(self, split: Split) -> tuple[str, list[Path]]:
        given = self._given.get(split)
        if given is None:
            return find_split(self._root, split, self._layout)
        return resolve_given_split(self._root, given)

    @cached_property
    def _hub_splits(self) -> dict[str, Any]:
        return {} if self._hub is None else load_hub(self._hub)

    def _hub_split(self, split: Split) -> str:
        """The name of a split in the dataset of the hub. Empty: it has no such split."""
        return next((word for word in SPLIT_WORDS[split] if word in self._hub_splits), "")
