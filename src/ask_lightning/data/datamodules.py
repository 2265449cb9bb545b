"""Lightning data modules for audio–text retrieval. Axes: `B` batch, `T` samples, `F` frames."""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset

from ask_lightning.data.audio.options import AudioOptions, Check, Features
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clip_parts import clip_parts
from ask_lightning.data.clips import Clip, abbreviate
from ask_lightning.data.columns import AUTO
from ask_lightning.data.overlap import columns_across_splits, warn_of_overlap
from ask_lightning.data.recordings import Recordings, TableFormat, missing_splits, read_recordings
from ask_lightning.data.splits import SPLITS, Split, split_by_clip
from ask_lightning.data.synthetic.soundscapes import MAX_CAPTIONS, Soundscapes, check_domain
from ask_lightning.utilities.arguments import check_count, check_range
from ask_lightning.utilities.augmentation import without_augmentation
from ask_lightning.utilities.clip_ids import integer_ids

Item = dict[str, Any]
Batch = dict[str, Any]


def collate_pairs(items: Sequence[Item]) -> Batch:
    """Make a batch of items of a dataset.

    Args:
        items: Dicts with the same keys. Values are integers, texts, or tensors that differ at most in the
            length of the first axis.

    Returns:
        A dict with the same keys: tensors stacked, shorter ones padded with zeros at the end; integers as an
        int64 tensor; texts as a list. For the datasets here these are `"waveform"` `(B, T)` and
        `"num_samples"` `(B,)`, or `"log_mel"` `(B, F, num_mels)`; `"caption"`, a list of `B` texts;
        `"clip_id"` `(B,)` and `"caption_id"` `(B,)`.

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
    """Shuffles by seed and epoch alone, and tells the dataset which epoch it is.

    torch's sampler for several processes already shuffles by seed and epoch. Lightning calls its `set_epoch`,
    also after a resume, and does not replace it on several devices. Here it serves a single process as well.

    Args:
        dataset: Dataset to shuffle. If it has a method `set_epoch`, that is called too; so it is for the
            parts of a `Subset` and of a `ConcatDataset`.
        num_replicas: Number of processes.
        rank: Number of this process.
        seed: Seed of the shuffles.

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
            epoch: Number of the epoch, counted from 0.
        """
        super().set_epoch(epoch)
        _move_to_epoch(self.dataset, epoch)


def _move_to_epoch(dataset: object, epoch: int) -> None:
    """Tell a dataset, or those that it is made of, which epoch it is."""
    set_epoch = getattr(dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    elif isinstance(dataset, Subset):
        _move_to_epoch(dataset.dataset, epoch)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _move_to_epoch(part, epoch)


class _LateLoader(DataLoader[Item]):
    """Starts its workers with the first batch.

    Lightning calls `iter` before it tells the sampler to which epoch a resumed run has come, and workers
    read ahead at once: the batches of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class RetrievalDataModule(L.LightningDataModule, ABC):
    """Loaders over audio–caption pairs. Subclasses define the datasets in `build`.

    The training loader shuffles and drops the last, smaller batch. Its order depends on `seed` and the
    epoch, and no loader draws from torch's global random generator: two runs see the same batches
    whatever else they draw. The other loaders keep the order of their dataset.

    Args:
        batch_size: Number of pairs in a batch of each process, at least 2.
        num_workers: Number of worker processes of each loader.
        seed: Seed of the shuffles, at least 0.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> class Tiny(RetrievalDataModule):
        ...     def build(self):
        ...         return {name: Soundscapes(4, seconds=1, split=name) for name in ("train", "val")}
        >>> next(iter(Tiny(batch_size=4).train_dataloader()))["waveform"].shape
        torch.Size([4, 16000])
    """

    def __init__(self, *, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        check_count("batch_size", batch_size, 2)
        check_count("num_workers", num_workers, 0)
        check_count("seed", seed, 0)
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._seed = seed

    @abstractmethod
    def build(self) -> Mapping[str, Dataset[Item]]:
        """Make the datasets. Called once, when they are first needed.

        Returns:
            Datasets by name: `"train"`, `"val"` and perhaps `"test"`. Their items have to be as
            `collate_pairs` takes them.
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
        train = self._dataset("train")
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
        return self._loader(train, kind=_LateLoader, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Item]:
        """Validation batches in the order of the dataset.

        Raises:
            ValueError: There is no validation dataset.
        """
        return self._loader(self._dataset("val"))

    def test_dataloader(self) -> DataLoader[Item]:
        """Test batches in the order of the dataset.

        Raises:
            ValueError: There is no test dataset.
        """
        return self._loader(self._dataset("test"))

    def predict_dataloader(self) -> DataLoader[Item]:
        """Test batches in the order of the dataset.

        Raises:
            ValueError: There is no test dataset.
        """
        return self.test_dataloader()

    def ordered_dataloader(self, split: str) -> DataLoader[Item]:
        """All batches of a split in the order of its dataset and without random crops, to encode it.

        Args:
            split: `"train"`, `"val"` or `"test"`.

        Raises:
            ValueError: There is no such dataset.
        """
        return self._loader(without_augmentation(self._dataset(split)))

    def knowledge_dataset(self) -> Dataset[Item]:
        """The training pairs without random crops, to build the knowledge base from.

        Pass the method itself: `KnowledgeRefreshCallback(source=data.knowledge_dataset)`.

        Raises:
            ValueError: There is no training dataset.
        """
        return self._training_without_crops

    @cached_property
    def _training_without_crops(self) -> Dataset[Item]:
        """One object for all refreshes: another one would count as other data."""
        return without_augmentation(self._dataset("train"))

    def _dataset(self, name: str) -> Dataset[Item]:
        if name not in self.datasets:
            raise ValueError(f"There is no {name} dataset, only {', '.join(self.datasets)}.")
        return self.datasets[name]

    def _loader(
        self, dataset: Dataset[Item], *, kind: type[DataLoader[Any]] = DataLoader, **options: Any
    ) -> DataLoader[Item]:
        """A loader with the settings that all loaders have in common."""
        return kind(
            dataset,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            collate_fn=collate_pairs,
            # Merely starting a loader draws the workers' seeds; without this, from the global generator.
            generator=torch.Generator().manual_seed(self._seed),
            **options,
        )


class DatasetsDataModule(RetrievalDataModule):
    """Loaders over datasets that exist already, such as the published splits of a benchmark.

    Args:
        train: Dataset for training, with items as `collate_pairs` takes them.
        val: Dataset for validation.
        test: Dataset for testing. None: there is no test.
        batch_size: Number of pairs in a batch of each process, at least 2.
        num_workers: Number of worker processes of each loader.
        seed: Seed of the shuffles, at least 0.

    Examples:
        >>> train, val = Soundscapes(8, seconds=1), Soundscapes(4, seconds=1, split="val")
        >>> data = DatasetsDataModule(train, val, batch_size=4)
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
        """Return the datasets that were passed; a warning says what their splits share."""
        warn_of_overlap(
            type(self).__name__, self._given, caption_remedy="If they are copies, remove them from one split."
        )
        return self._given


class SoundscapeData(RetrievalDataModule):
    """Synthetic soundscapes: a retrieval task that needs no download and trains in seconds on a CPU.

    Args:
        num_train: Number of training clips, at least 1.
        num_val: Number of validation clips, at least 1.
        num_test: Number of test clips, at least 1.
        scenes_seed: Seed of the scenes, at least 0.
        sample_rate: Rate of the waveforms in Hz, at least 16000.
        seconds: Length of the clips, at least 0.5.
        eval_captions_per_clip: Number of captions of each validation and test clip, 1 to 5. Training clips
            have one.
        features: None: batches hold waveforms. `"log_mel"`: they hold log-mel spectrograms, which are
            computed once.
        num_mels: Number of mel bins of the spectrograms.
        event_probabilities: Probability of each event type by its name; see `Soundscapes`.
        noise: Factor on the loudness of the noise, at least 0.
        batch_size: Number of pairs in a batch of each process, at least 2.
        num_workers: Number of worker processes of each loader.
        seed: Seed of the shuffles, at least 0.

    Examples:
        >>> data = SoundscapeData(num_train=8, num_val=4, num_test=4, seconds=1, batch_size=4)
        >>> next(iter(data.train_dataloader()))["waveform"].shape
        torch.Size([4, 16000])
    """

    def __init__(
        self,
        num_train: int = 1500,
        num_val: int = 300,
        num_test: int = 300,
        *,
        scenes_seed: int = 0,
        sample_rate: int = 16000,
        seconds: float = 2.5,
        eval_captions_per_clip: int = 3,
        features: Features | None = None,
        num_mels: int = 64,
        event_probabilities: Mapping[str, float] | None = None,
        noise: float = 1.0,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for name, count in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
            check_count(name, count)
        check_count("scenes_seed", scenes_seed, 0)
        check_count("eval_captions_per_clip", eval_captions_per_clip)
        check_range("eval_captions_per_clip", eval_captions_per_clip, 1, MAX_CAPTIONS)
        check_domain(event_probabilities, noise)
        self._num_clips: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self._eval_captions_per_clip = eval_captions_per_clip
        self._options: dict[str, Any] = {
            "seed": scenes_seed,
            "sample_rate": sample_rate,
            "seconds": seconds,
            "features": features,
            "num_mels": num_mels,
            "event_probabilities": event_probabilities,
            "noise": noise,
        }

    def build(self) -> Mapping[str, Soundscapes]:
        """Render the clips."""
        return {
            split: Soundscapes(
                num_clips,
                split=split,
                captions_per_clip=1 if split == "train" else self._eval_captions_per_clip,
                **self._options,
            )
            for split, num_clips in self._num_clips.items()
        }


class FolderData(RetrievalDataModule):
    r"""One's own recordings: a folder and a table, or a dataset of the hub; no clip is in two splits.

    The splits are those that the table names, or a division at random. Where each split has a CSV of its own,
    make an `AudioFolder` for each and pass them to `DatasetsDataModule`.

    Args:
        root: Folder of the audio files. It is left out with `hub`.
        annotations: Path of a CSV or of a parquet file, from the current folder or from `root`. None: the
            only table in `root`; where there is none, the names of the files are their captions.
        hub: Name of a dataset of the Hugging Face hub with columns of audio and of captions, or a folder that
            `save_to_disk` wrote, to read instead.
        filename_column: Name of the column of audio files, which are relative to `root` or absolute.
            `"auto"`: it has one of the usual names, see `ask_lightning.data.columns`.
        caption_columns: Name of the column of captions, or names of several columns, or `"auto"`.
        clip_id_column: Name of the column of clip ids. None: each file is a clip of its own. `"auto"`: a
            column with a usual name, if there is one.
        split_column: Name of the column that says which files are for training (`train`), validation (`val`,
            `dev`) and test (`test`, `eval`). `"auto"`: a column with a usual name, if there is one. None: the
            clips are divided at random.
        delimiter: Character between the fields of the CSV. `"auto"`: as the header tells.
        encoding: Encoding of the CSV.
        caption_style: `"raw"` for captions as they are, `"plain"` for lower case without punctuation; see
            `ask_lightning.data.plain_caption`.
        collection: Name that keeps the clip ids apart from those of another folder that gives the same names
            to other recordings.
        fractions: Share of the clips for training and validation, or for training, validation and test,
            where the table does not say. A table that names no validation clips lends training clips to it.
        split_seed: Seed of the division.
        sample_rate: Rate of the waveforms in Hz.
        seconds: Length of the crops, at random places in training and in the middle otherwise.
        features: None for waveforms, `"log_mel"` for spectrograms; see `AudioOptions`.
        num_mels: Number of mel bins of the spectrograms.
        strict: Whether a file that cannot be used is an error, or left out with a warning.
        check: `"header"`, `"decode"` or `"none"`: how files are examined; see `AudioOptions`.
        cache: None, `"memory"` or a folder; see `AudioOptions`.
        batch_size: Number of pairs in a batch of each process, at least 2.
        num_workers: Number of worker processes of each loader.
        seed: Seed of the shuffles and the random crops, at least 0.

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
        >>> next(iter(data.val_dataloader()))["waveform"].shape
        torch.Size([4, 16000])
    """

    def __init__(
        self,
        root: str | Path | None = None,
        annotations: str | Path | None = None,
        *,
        hub: str | None = None,
        filename_column: str = AUTO,
        caption_columns: str | Sequence[str] = AUTO,
        clip_id_column: str | None = AUTO,
        split_column: str | None = AUTO,
        delimiter: str = AUTO,
        encoding: str = "utf-8",
        caption_style: CaptionStyle = "raw",
        collection: str = "",
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        sample_rate: int = 16000,
        seconds: float = 10.0,
        features: Features | None = None,
        num_mels: int = 64,
        strict: bool = False,
        check: Check = "header",
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
        self._place = (root, annotations, hub)
        self._caption_style: CaptionStyle = caption_style
        self._form = TableFormat(
            filename_column=filename_column,
            caption_columns=caption_columns,
            clip_id_column=clip_id_column,
            split_column=split_column,
            delimiter=delimiter,
            encoding=encoding,
            collection=collection,
        )
        self._audio = AudioOptions(
            sample_rate=sample_rate,
            seconds=seconds,
            features=features,
            num_mels=num_mels,
            seed=seed,
            strict=strict,
            check=check,
            cache=cache,
        )

    def build(self) -> Mapping[str, ClipDataset]:
        """Read the table, examine the files, divide the clips."""
        found, whole = self._recordings
        datasets: dict[str, ClipDataset] = {
            split: whole.variant(clips=clips, crop="random" if split == "train" else "center")
            for split, clips in self._divide(whole.listed, found).items()
        }
        self._warn_of_overlap(datasets, found)
        return datasets

    def ordered_dataloader(self, split: str) -> DataLoader[Item]:
        """All batches of a split in the order of its dataset and without random crops, to encode it.

        Args:
            split: `"train"`, `"val"`, `"test"`, or `"all"` for all clips.

        Raises:
            ValueError: There is no such dataset.
        """
        if split != "all":
            return super().ordered_dataloader(split)
        return self._loader(self._recordings[1])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of training: as `"training_clips"` the ids of clips and files, int64."""
        clips = [clip for part in clip_parts(self.datasets["train"]) for clip in part.clips]
        # A table may get, lose or rename its column of clip ids: then a file is known by its own name.
        names = {name for clip in clips for name in (clip.recording, clip.key)}
        return {"training_clips": integer_ids(sorted(names))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if validation or test clips were training clips when the checkpoint was written.

        Rows that are new in a table, or gone, move clips near the borders of the division.

        Args:
            state_dict: What `state_dict` has returned.
        """
        parts = [part for split in ("val", "test") for part in clip_parts(self.datasets.get(split))]
        clips = [clip for part in parts for clip in part.clips]
        known = state_dict["training_clips"]
        by_id = torch.isin(integer_ids([clip.recording for clip in clips]), known)
        by_file = torch.isin(integer_ids([clip.key for clip in clips]), known)
        names = [
            clip.name for clip, is_known in zip(clips, (by_id | by_file).tolist(), strict=True) if is_known
        ]
        if names:
            rank_zero_warn(
                f"{self._recordings[0].source}: {len(names)} of {len(clips)} validation and test clips "
                f"({abbreviate(names)}) were training clips of the checkpoint. Results on them say nothing. "
                "Pass table and flags of the training; a table that changes needs a column of splits."
            )

    @cached_property
    def _recordings(self) -> tuple[Recordings, ClipDataset]:
        """What there is before it is divided, which a few clips that are only to be encoded need not be."""
        found = read_recordings(*self._place, self._form)
        return found, ClipDataset(found.clips, found.store, self._audio, caption_style=self._caption_style)

    def _divide(self, clips: Sequence[Clip], found: Recordings) -> dict[Split, list[Clip]]:
        """The clips of each split.

        Neither the order of the rows nor the folder in which they are matters. Clips that are left out count,
        so that a file which is missing today moves no other clip to another split.
        """
        if not found.splits:
            return dict(zip(SPLITS, self._parts(clips, self._fractions), strict=False))
        missing = missing_splits(found.splits)
        divided = {split: [clip for clip in clips if found.splits[clip.key] == split] for split in SPLITS}
        if "train" in missing:
            raise ValueError(f"{found.source}: no clip is for training. Correct its splits.")
        if "val" in missing:
            train, val, *_ = self._fractions
            shares = (train / (train + val), val / (train + val))
            divided["train"], divided["val"] = self._parts(divided["train"], shares)
            rank_zero_info(
                f"{found.source} names no validation clips: {len(divided['val'])} of the training clips are."
            )
        return {split: part for split, part in divided.items() if part}

    def _parts(self, clips: Sequence[Clip], fractions: Sequence[float]) -> list[list[Clip]]:
        """The clips in parts at random, takes of a recording together."""
        # Some systems write an accent as a sign of its own.
        recordings = [unicodedata.normalize("NFC", clip.recording) for clip in clips]
        parts = split_by_clip(recordings, fractions, self._split_seed)
        return [[clips[index] for index in indices] for indices in parts]

    def _warn_of_overlap(self, datasets: Mapping[str, ClipDataset], found: Recordings) -> None:
        """Warn of takes and captions that are in training and in evaluation."""
        columns = found.columns
        at_random = not found.splits
        remedy = "Short captions repeat by chance; give copies of a recording the same clip id."
        has_one_each = all(len(clip.captions) == 1 for part in datasets.values() for clip in part.clips)
        if columns and has_one_each and columns.clip_id is None and at_random:
            remedy += (
                f" `clip_id_column={columns.captions[0]!r}` keeps clips with equal captions in one split; "
                "they then count as one clip, also in search."
            )
        warn_of_overlap(found.source, datasets, caption_remedy=remedy)
        if columns is None or not found.delimiter or columns.clip_id is not None or not at_random:
            return
        shared = columns_across_splits(
            found.source,
            [part.clips for part in datasets.values()],
            filename_column=columns.filename,
            delimiter=found.delimiter,
            encoding=self._form.encoding,
        )
        for column in columns.captions:
            shared.pop(column, None)
        if shared:
            listed = ", ".join(f"{column!r} ({count} clips)" for column, count in shared.items())
            rank_zero_warn(
                f"{found.source}: validation and test clips share values of these columns with training "
                f"clips: {listed}. If one of them says which recording a file was taken from, pass it as "
                "`clip_id_column`, which keeps takes together."
            )
