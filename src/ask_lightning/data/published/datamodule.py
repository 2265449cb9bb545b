"""What the data modules of the published datasets have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.audio.options import AudioOptions, Check, Crop
from ask_lightning.data.audio.stores import FileStore
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip, abbreviate, count_captions
from ask_lightning.data.datamodules import RetrievalDataModule
from ask_lightning.data.keys import plain_words
from ask_lightning.data.published.counts import SplitReport, log_report, report_table
from ask_lightning.data.published.enrichment import EnrichedCaptions
from ask_lightning.data.published.exclusion import exclude_clips
from ask_lightning.data.published.file_index import FolderIndex, Matches
from ask_lightning.data.published.hdf5 import HDF5Store
from ask_lightning.data.published.knowledge import KnowledgeSource
from ask_lightning.data.published.leakage import find_leakage
from ask_lightning.data.published.locate import Layout
from ask_lightning.data.published.split_reader import LazyDatasets, SplitReader
from ask_lightning.data.splits import SPLITS, Split
from ask_lightning.utilities.arguments import check_choice, check_range

_SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
_EVALUATION: tuple[Split, ...] = ("val", "test")
_NO_ENRICHED_CAPTIONS = EnrichedCaptions()
_TRAINING_CLIPS = KnowledgeSource()


def _check_place(hub: str | None, **of_files: object) -> None:
    """Refuse what says where files are beside a dataset of the hub, which would not be read from them."""
    given = [name for name, value in of_files.items() if value not in (None, "auto")]
    if hub is not None and given:
        raise ValueError(
            f"Arguments `hub` and `{given[0]}` exclude each other: the dataset {hub!r} holds annotations and "
            "audio. Leave one of them out."
        )


class PublishedDataModule(RetrievalDataModule):
    """Loaders over a published dataset. `AudioCapsData` and `ClothoData` define which.

    Args:
        root: Folder of the dataset, with annotations and audio files at any depth.
        annotations: Paths of the annotations of `"train"`, `"val"` and `"test"`, relative to `root` or
            absolute. The files of splits that are left out are found by name.
        audio_folder: Folder of the audio files, relative to `root` or absolute. None: `root`.
        layout: `"files"`, `"hdf5"`, `"parquet"`, or `"auto"`: the first of HDF5, parquet and files that is
            there.
        hub: Name of a dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote, to read
            instead, without `annotations`, `audio_folder` and `layout`.
        hdf5_sample_rate: Rate of the waveforms in HDF5 files in Hz.
        exclude: Clips to leave out of training: path of a list, or ids; see `read_ids`.
        enriched: Captions by clip id that replace or complete those of the training clips; by default there
            are none.
        knowledge: Source of `knowledge_dataset`, by default the training clips.
        caption_style: `"raw"` for captions as they are, `"plain"` for lower case without punctuation; see
            `ask_lightning.data.plain_caption`.
        check_counts: Whether to warn of clip counts that were never published.
        sample_rate: Rate of the waveforms in Hz.
        seconds: Length of a training crop, and the longest that a training waveform may be.
        eval_seconds: Length of crops in validation and test. None: `seconds`.
        train_crop: `"random"`, `"center"`, or `"full"` for whole clips in padded batches.
        eval_crop: `"center"` or `"full"`.
        strict: Whether clips without usable audio are an error, or left out with a warning.
        check: `"header"`, `"decode"` or `"none"`: how files are examined; see `AudioOptions`.
        cache: None, `"memory"` or a folder; see `AudioOptions`.
        batch_size: Number of pairs in a batch of each process, at least 2.
        num_workers: Number of worker processes of each loader.
        seed: Seed of the shuffles and the random crops, at least 0.

    Attributes:
        reports: Report of each split that has been read.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> from ask_lightning.data import AudioCapsData, ClothoData
        >>> issubclass(AudioCapsData, PublishedDataModule), issubclass(ClothoData, PublishedDataModule)
        (True, True)
    """

    dataset_name: ClassVar[str]
    namespace: ClassVar[str]

    def __init__(
        self,
        root: str | Path,
        *,
        annotations: dict[str, str] | None = None,
        audio_folder: str | None = None,
        layout: Layout = "auto",
        hub: str | None = None,
        hdf5_sample_rate: int = 32000,
        exclude: str | Sequence[str] | None = None,
        enriched: EnrichedCaptions = _NO_ENRICHED_CAPTIONS,
        knowledge: KnowledgeSource = _TRAINING_CLIPS,
        caption_style: CaptionStyle = "raw",
        check_counts: bool = True,
        sample_rate: int = 32000,
        seconds: float = 10.0,
        eval_seconds: float | None = None,
        train_crop: Crop = "random",
        eval_crop: Literal["center", "full"] = "center",
        strict: bool = False,
        check: Check = "header",
        cache: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_choice("layout", layout, get_args(Layout))
        check_choice("train_crop", train_crop, get_args(Crop))
        check_choice("eval_crop", eval_crop, ("center", "full"))
        check_choice("caption_style", caption_style, get_args(CaptionStyle))
        for split in annotations or ():
            check_choice("annotations", split, SPLITS)
        _check_place(hub, annotations=annotations, audio_folder=audio_folder, layout=layout)
        train = AudioOptions(
            sample_rate=sample_rate,
            seconds=seconds,
            crop=train_crop,
            seed=seed,
            strict=strict,
            check=check,
            cache=cache,
        )
        if eval_seconds is not None:
            check_range("eval_seconds", eval_seconds, 1 / sample_rate)
        evaluation = replace(train, seconds=eval_seconds or seconds, crop=eval_crop)
        self._audio: Mapping[Split, AudioOptions] = {"train": train, "val": evaluation, "test": evaluation}
        self.reports: dict[str, SplitReport] = {}
        self._root = Path(root)
        self._audio_folder = self._root if audio_folder is None else self._root / audio_folder
        self._splits = SplitReader(
            self._root,
            annotations or {},
            self.namespace,
            self.read_annotations,
            layout=layout,
            hub=hub,
            hdf5_sample_rate=hdf5_sample_rate,
        )
        self._exclude = exclude
        self._enriched = enriched
        self._knowledge = knowledge
        self._caption_style: CaptionStyle = caption_style
        self._check_counts = check_counts
        self._held_out: list[Clip] = []
        self._knowledge_dataset: ClipDataset | None = None

    @abstractmethod
    def read_annotations(self, path: Path, split: Split) -> list[Clip]:
        """Read a CSV or JSON of annotations.

        Args:
            path: Path of the file.
            split: `"train"`, `"val"` or `"test"`.
        """

    @abstractmethod
    def match_files(self, clips: Sequence[Clip], index: FolderIndex, split: Split) -> Matches:
        """Find the audio files of clips.

        Args:
            clips: Clips of a split.
            index: Index of the folder of audio.
            split: `"train"`, `"val"` or `"test"`.
        """

    @abstractmethod
    def describe_file_names(self, clip: Clip) -> str:
        """The names that the file of a clip may have, for an error.

        Args:
            clip: Clip of the dataset.
        """

    def build(self) -> LazyDatasets:
        """The splits that are there. Each is read when it is first needed.

        Raises:
            FileNotFoundError: No split is there.
        """
        return LazyDatasets({split: partial(self._make_dataset, split) for split in self._splits.names()})

    def setup(self, stage: str) -> None:
        """Read the splits of a stage at its start, where errors are expected.

        Args:
            stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.

        Raises:
            FileNotFoundError: A trainer is to train or to validate, and there are no annotations for it.
        """
        if stage == "fit" and self.trainer is not None:
            validates = bool(getattr(self.trainer, "limit_val_batches", 0))
            self._check_splits(("train", "val") if validates else ("train",))
        if stage == "fit" and "train" in self.datasets:
            self._warn_of_shared_clips()
        for split in _SPLITS_OF_STAGE.get(stage, ()):
            if split in self.datasets:
                _ = self.datasets[split]

    def _check_splits(self, needed: Sequence[str]) -> None:
        """Refuse to begin where a split is missing, which Lightning would meet in the middle of a run."""
        missing = [split for split in needed if split not in self.datasets]
        if missing:
            raise FileNotFoundError(
                f"There are no annotations of {' and '.join(missing)} in {self._root}, only of "
                f"{', '.join(self.datasets)}. Put the file beside the others, or name each by `annotations`. "
                "`limit_val_batches=0` of the trainer trains without validation."
            )

    @property
    def has_other_knowledge(self) -> bool:
        """Whether the arguments name clips or captions for the knowledge that the training set has not."""
        has_captions = self._enriched.path is not None and self._enriched.used_in == "knowledge"
        return has_captions or self._knowledge != _TRAINING_CLIPS

    def knowledge_dataset(self) -> ClipDataset:
        """The clips to build the knowledge base from, without random crops and without evaluation clips.

        Pass the method itself: `KnowledgeRefreshCallback(source=data.knowledge_dataset)`. It reads the
        source at the first call and returns the same dataset at each.

        Returns:
            The training clips, with their enriched captions if there are any for knowledge, or WavCaps.
        """
        if self._knowledge_dataset is None:
            audio = self._audio["train"]
            self._knowledge_dataset = self._knowledge.build(
                self._training_knowledge,
                [*self.evaluation_clips(), *self._held_out],
                replace(audio, crop="center") if audio.crop == "random" else audio,
                caption_style=self._caption_style,
                check_counts=self._check_counts,
            )
        return self._knowledge_dataset

    def evaluation_clips(self) -> list[Clip]:
        """The clips of the validation and test splits, as published."""
        return [
            clip for split in _EVALUATION if split in self.datasets for clip in self._splits.read(split)[0]
        ]

    def hold_out(self, clips: Sequence[Clip]) -> None:
        """Keep more clips out of the knowledge, besides the evaluation clips of this dataset.

        Args:
            clips: Clips that the model will be tested on, such as the `evaluation_clips` of another dataset.

        Raises:
            RuntimeError: The knowledge has been made already.
        """
        if self._knowledge_dataset is not None:
            raise RuntimeError(
                "`hold_out` comes too late: `knowledge_dataset` has been called already. "
                "Call `hold_out` first."
            )
        self._held_out += clips

    def report(self) -> str:
        """The reports of the splits that have been read, as a table in Markdown."""
        return report_table(list(self.reports.values()))

    def _warn_of_shared_clips(self) -> None:
        """Warn of validation and test clips that are training clips as well."""
        evaluation = self.evaluation_clips()
        leakage = find_leakage(self._plain_train_clips, evaluation)
        captions = {plain_words(caption) for clip in evaluation for caption in clip.captions}
        # A title alone may be chance: Clotho's are not unique.
        titled = frozenset(leakage.by_title)
        shared = leakage.by_id + [
            clip.key
            for clip in self._plain_train_clips
            if clip.key in titled and any(plain_words(caption) in captions for caption in clip.captions)
        ]
        if shared:
            rank_zero_warn(
                f"{self.dataset_name}: {len(shared)} of {len(self._plain_train_clips)} training clips are "
                f"validation or test clips as well ({abbreviate(shared)}). Are the annotations of the splits "
                "the right files? `exclude` leaves clips out of training."
            )

    def _make_dataset(self, split: Split) -> ClipDataset:
        """Read a split, find its audio, and report what was found."""
        listed, store = self._splits.read(split)
        clips = self._train_clips("train") if split == "train" else listed
        audio = self._audio[split]
        matches = Matches()
        if store is None:
            matches = self._find_files(clips, split)
            store = FileStore(self._audio_folder, matches.files)
            clips = [clip for clip in clips if clip.key in matches.files]
        elif not isinstance(store, HDF5Store) and audio.check == "header":
            audio = replace(audio, check="none")  # to read a header in a table is to read all of the audio
        dataset = ClipDataset(clips, store, audio, caption_style=self._caption_style)
        self.reports[split] = SplitReport(
            self.dataset_name,
            split,
            len(listed),
            count_captions(listed),
            len(dataset.clips),
            count_captions(dataset.clips),
            matches.missing,
            matches.variants,
            matches.problems(),
        )
        log_report(self.reports[split], check_counts=self._check_counts)
        return dataset

    def _find_files(self, clips: Sequence[Clip], split: Split) -> Matches:
        """Find the files of clips; refuse a split without any, and with `strict` one without some."""
        matches = self.match_files(clips, self._index, split)
        if not matches.files or (self._audio[split].strict and matches.missing):
            raise AudioFileError(
                f"{self._audio_folder}: {len(matches.missing)} of {len(clips)} clips of {self.dataset_name} "
                f"{split} have no file there ({abbreviate(matches.missing)}). It holds {self._index.count} "
                "audio files"
                + (f", such as {', '.join(self._index.names())}" if self._index.count else "")
                + f". Looked for {self.describe_file_names(clips[0])}. Pass their folder as `audio_folder`."
            )
        return matches

    @cached_property
    def _index(self) -> FolderIndex:
        return FolderIndex(self._audio_folder)

    def _training_knowledge(self) -> ClipDataset:
        train = cast(ClipDataset, self._dataset("train"))
        return train.without_random_crops().variant(clips=self._train_clips("knowledge"))

    def _train_clips(self, use: Literal["knowledge", "train"]) -> list[Clip]:
        """The training clips, with the captions that are meant for a use of them."""
        enriched = self._enriched.used_in in (use, "both")
        return self._enriched_train_clips if enriched else self._plain_train_clips

    @cached_property
    def _plain_train_clips(self) -> list[Clip]:
        clips, _ = self._splits.read("train")
        if self._exclude is None:
            return clips
        return exclude_clips(clips, self._exclude, f"{self.dataset_name} train")

    @cached_property
    def _enriched_train_clips(self) -> list[Clip]:
        return self._enriched.apply(self._plain_train_clips, f"{self.dataset_name} train")
