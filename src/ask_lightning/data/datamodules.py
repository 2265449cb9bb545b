"""Lightning data modules for audio–text retrieval. Axes: `B` batch, `T` samples, `F` frames."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ask_lightning.data.captions import read_captions, split_by_clip
from ask_lightning.data.folder import AudioFolder
from ask_lightning.data.synthetic.soundscapes import Soundscapes, Split

Item = dict[str, Any]
Batch = dict[str, Any]


def collate_pairs(items: Sequence[Item]) -> Batch:
    """Items of a dataset as one batch.

    Args:
        items: Dicts with the same keys: tensors that differ at most in their first length, a text, a number.

    Returns:
        A dict with the same keys: tensors stacked, shorter ones filled up with zeros at the end; numbers as
        an int64 tensor; texts as a list. For the datasets here: `"waveform"` `(B, T)` or `"log_mel"`
        `(B, F, num_mels)`, perhaps `"num_samples"` `(B,)`, `"caption"` a list of `B` texts, `"clip_id"`
        `(B,)`.

    Examples:
        >>> collate_pairs([{"caption": "rain", "clip_id": 3}, {"caption": "wind", "clip_id": 4}])
        {'caption': ['rain', 'wind'], 'clip_id': tensor([3, 4])}
    """
    batch: Batch = {}
    for key, value in items[0].items():
        values = [item[key] for item in items]
        if isinstance(value, torch.Tensor):
            same = all(value.shape == values[0].shape for value in values)
            batch[key] = torch.stack(values) if same else pad_sequence(values, batch_first=True)
        elif isinstance(value, int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[key] = values
    return batch


class EpochSampler(DistributedSampler[Item]):
    """A shuffle that depends on a seed and the epoch alone, and tells the dataset which epoch it is.

    torch's own sampler for several processes already shuffles by seed and epoch, and Lightning calls its
    `set_epoch`, also after a resume, and leaves it in place on several devices. It serves one process
    as well.

    Args:
        dataset: What to shuffle. If it has a `set_epoch`, that is called too.
        num_replicas: Number of processes.
        rank: Which of them this is.
        seed: Which sequence of shuffles.

    Examples:
        >>> sampler = EpochSampler(Soundscapes(4, seconds=0.5), num_replicas=1, rank=0, seed=0)
        >>> first = list(sampler)
        >>> list(sampler) == first, sorted(first)
        (True, [0, 1, 2, 3])
    """

    def __init__(self, dataset: Dataset[Item], *, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(
            dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True
        )

    def set_epoch(self, epoch: int) -> None:
        """Move to another epoch.

        Args:
            epoch: Counted from 0.
        """
        super().set_epoch(epoch)
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


class PairData(L.LightningDataModule, ABC):
    """Loaders over audio–caption pairs; a subclass says which pairs.

    The training loader shuffles and drops the last, smaller batch. Its order depends on `seed` and the
    epoch, and no loader draws from torch's global random generator: two runs see the same batches
    whatever else they draw. The other loaders keep the order of their dataset.

    Args:
        batch_size: Pairs in a batch of each process, at least 2.
        num_workers: Worker processes of each loader.
        seed: Of the shuffles, at least 0.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> class Tiny(PairData):
        ...     def build(self):
        ...         return {name: Soundscapes(4, seconds=1, split=name) for name in ("train", "val")}
        >>> next(iter(Tiny(batch_size=4).train_dataloader()))["waveform"].shape
        torch.Size([4, 16000])
    """

    def __init__(self, *, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"Argument `batch_size` has to be at least 2, but got {batch_size}.")
        if seed < 0:
            raise ValueError(f"Argument `seed` has to be at least 0, but got {seed}.")
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._seed = seed

    @abstractmethod
    def build(self) -> Mapping[str, Dataset[Item]]:
        """Make the datasets. Called once, when they are first needed.

        Returns:
            Datasets by name: `"train"`, `"val"` and perhaps `"test"`. Items are as `collate_pairs` takes
            them.
        """

    @cached_property
    def datasets(self) -> Mapping[str, Dataset[Item]]:
        """The datasets by name: `"train"`, `"val"` and perhaps `"test"`."""
        return self.build()

    def setup(self, stage: str) -> None:
        """Make the datasets at the start of a run, where errors are expected.

        Args:
            stage: Not used; all datasets are made together.
        """
        _ = self.datasets

    def train_dataloader(self) -> DataLoader[Item]:
        """Shuffled batches; see the class.

        Raises:
            ValueError: There is no training dataset, or its pairs do not fill a batch.
        """
        train = self._part("train")
        trainer = self.trainer
        sampler = EpochSampler(
            train,
            num_replicas=1 if trainer is None else trainer.world_size,
            rank=0 if trainer is None else trainer.global_rank,
            seed=self._seed,
        )
        if len(sampler) < self._batch_size:
            raise ValueError(
                f"The {len(sampler)} training pairs of a process do not fill a batch of {self._batch_size}: "
                "there would be nothing to train on. Lower `batch_size`."
            )
        return self._loader(train, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Item]:
        """Batches in the order of the dataset.

        Raises:
            ValueError: There is no validation dataset.
        """
        return self._loader(self._part("val"))

    def test_dataloader(self) -> DataLoader[Item]:
        """Batches in the order of the dataset.

        Raises:
            ValueError: There is no test dataset.
        """
        return self._loader(self._part("test"))

    def predict_dataloader(self) -> DataLoader[Item]:
        """The same as for testing.

        Raises:
            ValueError: There is no test dataset.
        """
        return self.test_dataloader()

    def ordered_dataloader(self, split: str) -> DataLoader[Item]:
        """All batches of a split in the order of its dataset, to encode it.

        Args:
            split: `"train"`, `"val"` or `"test"`.

        Raises:
            ValueError: There is no such dataset.
        """
        return self._loader(self._part(split))

    def _part(self, name: str) -> Dataset[Item]:
        if name not in self.datasets:
            raise ValueError(f"There is no {name} dataset. Pass one as `{name}`.")
        return self.datasets[name]

    def _loader(self, dataset: Dataset[Item], **options: Any) -> DataLoader[Item]:
        return DataLoader(
            dataset,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=collate_pairs,
            # Merely starting a loader draws the workers' seeds; without this, from the global generator.
            generator=torch.Generator().manual_seed(self._seed),
            **options,
        )


class RetrievalData(PairData):
    """Loaders over datasets that exist already, such as the published parts of a benchmark.

    Args:
        train: Items as `collate_pairs` takes them.
        val: The same, for validation.
        test: The same, for testing. None: there is no test.
        batch_size: Pairs in a batch of each process, at least 2.
        num_workers: Worker processes of each loader.
        seed: Of the shuffles, at least 0.

    Examples:
        >>> train, val = Soundscapes(8, seconds=1), Soundscapes(4, seconds=1, split="val")
        >>> data = RetrievalData(train, val, batch_size=4)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["waveform"].shape, len(batch["caption"]), batch["clip_id"].dtype
        (torch.Size([4, 16000]), 4, torch.int64)
    """

    def __init__(
        self,
        train: Dataset[Item],
        val: Dataset[Item],
        test: Dataset[Item] | None = None,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self._given = {"train": train, "val": val} | ({} if test is None else {"test": test})

    def build(self) -> Mapping[str, Dataset[Item]]:
        """The datasets that were passed."""
        return self._given


class SoundscapeData(PairData):
    """Synthetic soundscapes: a retrieval task that needs no download and trains in seconds on a CPU.

    Args:
        num_train: Number of training clips.
        num_val: Number of validation clips.
        num_test: Number of test clips.
        scenes_seed: Which world of scenes, at least 0.
        seconds: Length of the clips, at least 0.5.
        eval_captions_per_clip: Captions of each validation and test clip, 1 to 5. Training clips have 1.
        num_mels: None: batches hold waveforms. A number: log-mel spectrograms with so many bins, computed
            once.
        batch_size: Pairs in a batch of each process, at least 2.
        num_workers: Worker processes of each loader.
        seed: Of the shuffles, at least 0.

    Examples:
        >>> data = SoundscapeData(num_train=8, num_val=4, num_test=4, seconds=1, batch_size=4)
        >>> next(iter(data.train_dataloader()))["log_mel"].shape
        torch.Size([4, 63, 64])
    """

    def __init__(
        self,
        num_train: int = 1500,
        num_val: int = 300,
        num_test: int = 300,
        *,
        scenes_seed: int = 0,
        seconds: float = 2.5,
        eval_captions_per_clip: int = 3,
        num_mels: int | None = 64,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self._num_clips: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self._eval_captions_per_clip = eval_captions_per_clip
        self._scenes_seed = scenes_seed
        self._seconds = seconds
        self._num_mels = num_mels

    def build(self) -> Mapping[str, Soundscapes]:
        """Render the clips."""
        return {
            split: Soundscapes(
                num_clips,
                split=split,
                seed=self._scenes_seed,
                seconds=self._seconds,
                captions_per_clip=1 if split == "train" else self._eval_captions_per_clip,
                num_mels=self._num_mels,
            )
            for split, num_clips in self._num_clips.items()
        }


class FolderData(PairData):
    r"""A folder of audio files and one CSV, divided so that no clip is in two parts.

    Where the division is given, make an `AudioFolder` for each part and pass them to `RetrievalData`.

    Args:
        folder: Where the audio files are.
        table: Path of the CSV.
        filename: Name of its column of audio files, relative to `folder`.
        captions: Name of its column of captions, or of several.
        clip_id: Name of its column of clip ids. None: a file is a clip.
        delimiter: What separates its fields.
        encoding: Of the CSV.
        fractions: Share of the clips for training and validation, or for training, validation and test.
        split_seed: Which division.
        sample_rate: Of the clips, in Hz.
        seconds: Length of the clips: at random places of longer files in training, else in their middle.
        num_mels: None: batches hold waveforms. A number: log-mel spectrograms with so many bins.
        strict: Whether a file that cannot be used is an error, or left out with a warning.
        check: `"header"` or `"decode"`: how files are examined at the start; see `AudioFolder`.
        cache: None, `"memory"` or a folder; see `AudioFolder`.
        batch_size: Pairs in a batch of each process, at least 2.
        num_workers: Worker processes of each loader.
        seed: Of the shuffles and the random crops, at least 0.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> import numpy, soundfile
        >>> folder = getfixture("tmp_path")
        >>> rows = ["filename,caption"]
        >>> for index in range(8):
        ...     soundfile.write(folder / f"{index}.wav", numpy.zeros(16000), 16000)
        ...     rows.append(f"{index}.wav,silence number {index}")
        >>> _ = (folder / "clips.csv").write_text("\n".join(rows))
        >>> data = FolderData(folder, folder / "clips.csv", fractions=(0.5, 0.5), seconds=1, batch_size=4)
        >>> next(iter(data.val_dataloader()))["log_mel"].shape
        torch.Size([4, 63, 64])
    """

    def __init__(
        self,
        folder: str | Path,
        table: str | Path,
        *,
        filename: str = "filename",
        captions: str | Sequence[str] = "caption",
        clip_id: str | None = None,
        delimiter: str = ",",
        encoding: str = "utf-8",
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        sample_rate: int = 16000,
        seconds: float = 10.0,
        num_mels: int | None = 64,
        strict: bool = False,
        check: Literal["header", "decode"] = "header",
        cache: Literal["memory"] | str | Path | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if len(fractions) not in (2, 3):
            raise ValueError(f"Argument `fractions` has to be 2 or 3 numbers, but got {fractions}.")
        self._fractions = fractions
        self._split_seed = split_seed
        self._folder = folder
        self._table = table
        self._table_options: dict[str, Any] = {
            "filename": filename,
            "captions": captions,
            "clip_id": clip_id,
            "delimiter": delimiter,
            "encoding": encoding,
        }
        self._audio_options: dict[str, Any] = {
            "sample_rate": sample_rate,
            "seconds": seconds,
            "num_mels": num_mels,
            "strict": strict,
            "check": check,
            "cache": cache,
            "seed": seed,
        }

    def build(self) -> Mapping[str, AudioFolder]:
        """Read the CSV, examine the files, divide them."""
        pairs = read_captions(self._table, **self._table_options)
        whole = AudioFolder(self._folder, pairs, **self._audio_options)
        parts = split_by_clip([pair.clip_id for pair in whole.pairs], self._fractions, self._split_seed)
        return {
            name: whole.part(indices, train=name == "train")
            for name, indices in zip(("train", "val", "test"), parts, strict=False)
        }
