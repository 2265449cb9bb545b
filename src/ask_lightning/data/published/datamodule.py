"""What the data modules of the published datasets have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.audio.stores import FileStore, HDF5Store
from ask_lightning.data.clip_dataset import Check, ClipDataset, Crop
from ask_lightning.data.clips import Clip, count_captions, some
from ask_lightning.data.datamodules import Item, PairData
from ask_lightning.data.published.counts import SplitReport, announce, table
from ask_lightning.data.published.file_index import FolderIndex, Matches
from ask_lightning.data.published.id_lists import EnrichMode, enrich, without
from ask_lightning.data.published.leakage import check_leakage, find_leakage
from ask_lightning.data.published.locate import Layout
from ask_lightning.data.published.splits import LazyParts, SplitReader
from ask_lightning.data.published.wavcaps import WavCaps

EnrichedIn = Literal["knowledge", "train", "both"]

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class PublishedData(PairData):
    """Loaders over a published dataset; `AudioCapsData` and `ClothoData` say which.

    Args:
        root: Folder of the dataset.
        train: Its file of training annotations, relative to `root` or absolute. None: found by name.
        val: The same for validation.
        test: The same for testing.
        audio: Folder of the audio files, relative to `root` or absolute. None: `root`.
        layout: `"files"`, `"hdf5"`, `"parquet"`, or `"auto"`: the first of HDF5, parquet, files that is
            there.
        hub: Name of a dataset of the Hugging Face hub, or a folder that `save_to_disk` wrote, to read
            instead.
        hdf5_rate: Of the waveforms in HDF5 files, in Hz.
        enriched: Path of captions by clip id, a CSV or JSON. None: there are none.
        enriched_mode: `"replace"` or `"add"`: what they do with a clip's own captions.
        enriched_in: `"knowledge"`, `"train"` or `"both"`: where they are used.
        exclude: Clips to leave out of training: a path of a list, or ids; see `read_ids`.
        knowledge: `"train"`, or the folder of WavCaps: what `knowledge_dataset` is.
        knowledge_collections: Of WavCaps, which; None: all that are there.
        knowledge_exclude: Clips to leave out of the knowledge, such as a published black list.
        exclude_evaluation: Whether to leave validation and test clips out of the knowledge; if not, a warning
            says how many are in it.
        sample_rate: Of the waveforms, in Hz.
        seconds: Length of a training crop, and the longest that a training waveform may be.
        eval_seconds: The same for validation and test. None: as `seconds`.
        train_crop: `"random"`, `"center"`, or `"full"` for whole clips in padded batches.
        eval_crop: `"center"` or `"full"`.
        strict: Whether clips without usable audio are an error, or left out with a warning.
        check: `"header"`, `"decode"` or `"none"`: how files are examined at the start; see `ClipDataset`.
        cache: None, `"memory"` or a folder; see `ClipDataset`.
        check_counts: Whether to warn of clip counts that were never published.
        batch_size: Pairs in a batch of each process, at least 2.
        num_workers: Worker processes of each loader.
        seed: Of the shuffles and the random crops, at least 0.

    Attributes:
        reports: The counts of each split that has been read.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> from ask_lightning.data import AudioCapsData, ClothoData
        >>> issubclass(AudioCapsData, PublishedData), issubclass(ClothoData, PublishedData)
        (True, True)
    """

    dataset_name: ClassVar[str]
    namespace: ClassVar[str]

    def __init__(
        self,
        root: str | Path,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        audio: str | None = None,
        layout: Layout = "auto",
        hub: str | None = None,
        hdf5_rate: int = 32000,
        enriched: str | None = None,
        enriched_mode: EnrichMode = "replace",
        enriched_in: EnrichedIn = "knowledge",
        exclude: str | Sequence[str] | None = None,
        knowledge: str = "train",
        knowledge_collections: Sequence[str] | None = None,
        knowledge_exclude: str | Sequence[str] | None = None,
        exclude_evaluation: bool = True,
        sample_rate: int = 32000,
        seconds: float = 10.0,
        eval_seconds: float | None = None,
        train_crop: Crop = "random",
        eval_crop: Literal["center", "full"] = "center",
        strict: bool = False,
        check: Check = "header",
        cache: str | None = None,
        check_counts: bool = True,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if eval_crop not in ("center", "full"):
            raise ValueError(f"Argument `eval_crop` has to be 'center' or 'full', but got {eval_crop!r}.")
        if layout not in ("auto", "files", "hdf5", "parquet"):
            raise ValueError(
                f"Argument `layout` has to be 'auto', 'files', 'hdf5' or 'parquet', but got {layout!r}."
            )
        if enriched_in not in ("knowledge", "train", "both"):
            raise ValueError(
                f"Argument `enriched_in` has to be 'knowledge', 'train' or 'both', but got {enriched_in!r}."
            )
        self.reports: dict[str, SplitReport] = {}
        self._root = Path(root)
        self._splits = SplitReader(
            self._root,
            {"train": train, "val": val, "test": test},
            self.namespace,
            self.read_table,
            layout=layout,
            hub=hub,
            hdf5_rate=hdf5_rate,
        )
        self._audio = self._root if audio is None else self._root / audio
        self._enriched = enriched
        self._enriched_mode: EnrichMode = enriched_mode
        self._enriched_in = enriched_in
        self._exclude = exclude
        self._knowledge = knowledge
        self._knowledge_collections = knowledge_collections
        self._knowledge_exclude = knowledge_exclude
        self._exclude_evaluation = exclude_evaluation
        self._held_out: list[Clip] = []
        self._sample_rate = sample_rate
        later = seconds if eval_seconds is None else eval_seconds
        self._seconds = {"train": seconds, "val": later, "test": later}
        self._crops: dict[str, Crop] = {"train": train_crop, "val": eval_crop, "test": eval_crop}
        self._strict = strict
        self._check: Check = check
        self._cache = cache
        self._check_counts = check_counts

    @abstractmethod
    def read_table(self, path: Path, split: str) -> list[Clip]:
        """Read a CSV of annotations.

        Args:
            path: Of the CSV.
            split: `"train"`, `"val"` or `"test"`.
        """

    @abstractmethod
    def match(self, clips: Sequence[Clip], index: FolderIndex, split: str) -> Matches:
        """Find the audio files of clips.

        Args:
            clips: Of a split.
            index: Of the folder of audio.
            split: `"train"`, `"val"` or `"test"`.
        """

    def build(self) -> LazyParts:
        """The splits that are there; each is read when it is first needed.

        Raises:
            FileNotFoundError: None is there.
        """
        return LazyParts({split: partial(self._make, split) for split in self._splits.names()})

    def setup(self, stage: str) -> None:
        """Read the splits of a stage at its start, where errors are expected.

        Args:
            stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        """
        for split in _STAGES.get(stage, ()):
            if split in self.datasets:
                _ = self.datasets[split]

    def ordered_dataloader(self, split: str) -> DataLoader[Item]:
        """All batches of a split in the order of its dataset, without random crops.

        Args:
            split: `"train"`, `"val"` or `"test"`.

        Raises:
            ValueError: There is no such dataset.
        """
        dataset = self._part(split)
        assert isinstance(dataset, ClipDataset)
        random = self._crops[split] == "random"
        return self._loader(dataset.variant(crop="center") if random else dataset)

    def knowledge_dataset(self) -> ClipDataset:
        """What to build the knowledge base from: no random crops, no evaluation clips.

        Pass the method itself: `KnowledgeRefreshCallback(source=data.knowledge_dataset)`. It reads the
        source at the first call and returns the same dataset at each.

        Returns:
            The training clips, with their enriched captions if there are any for knowledge, or WavCaps.
        """
        return self._knowledge_dataset

    def evaluation_clips(self) -> list[Clip]:
        """The clips of the validation and test splits, as published."""
        return [
            clip
            for split in ("val", "test")
            if split in self.datasets
            for clip in self._splits.read(split)[0]
        ]

    def hold_out(self, clips: Sequence[Clip]) -> None:
        """Say what else the model will be tested on; the knowledge is kept free of it as of its own splits.

        Args:
            clips: Such as the `evaluation_clips` of another dataset.

        Raises:
            RuntimeError: The knowledge has been made already.
        """
        if "_knowledge_dataset" in vars(self):
            raise RuntimeError("`hold_out` comes too late: `knowledge_dataset` has been called already.")
        self._held_out += clips

    def report(self) -> str:
        """The counts of the splits that have been read, as a table in Markdown."""
        return table(list(self.reports.values()))

    @cached_property
    def _knowledge_dataset(self) -> ClipDataset:
        crop: Crop = "full" if self._crops["train"] == "full" else "center"
        if self._knowledge == "train":
            clips = self._train_clips("knowledge")
            if self._knowledge_exclude is not None:
                clips = without(clips, self._knowledge_exclude, "the knowledge")
            train = self._part("train")
            assert isinstance(train, ClipDataset)
            source = train.variant(crop=crop, clips=clips)
        else:
            source = WavCaps(
                self._knowledge,
                collections=self._knowledge_collections,
                exclude=self._knowledge_exclude,
                sample_rate=self._sample_rate,
                seconds=self._seconds["train"],
                crop=crop,
                strict=self._strict,
                check=self._check,
                cache=self._cache,
                check_counts=self._check_counts,
            )
        evaluation = [*self.evaluation_clips(), *self._held_out]
        if not self._exclude_evaluation:
            check_leakage(source, evaluation)
            return source
        leakage = find_leakage(source, evaluation)
        leaked = {*leakage.by_id, *leakage.by_title}
        if leakage.by_caption:
            rank_zero_warn(
                f"{len(leakage.by_caption)} of {len(source.clips)} clips of the knowledge have the words of "
                f"a validation or test caption ({some(leakage.by_caption)}). They stay in it, since short "
                "captions repeat by chance. If they are the same recordings, leave them out with "
                '`knowledge_exclude`; `leaked_ids(..., by=["caption"])` lists them.'
            )
        if not leaked:
            return source
        if len(leaked) == len(source.clips):
            raise ValueError(
                f"All {len(leaked)} clips of the knowledge are validation or test clips. Pass another "
                "`knowledge`, or `exclude_evaluation=False` if you mean it."
            )
        rank_zero_info(
            f"Left out of the knowledge: {len(leaked)} of {len(source.clips)} clips that validation or test "
            f"sets hold ({some(sorted(leaked))})."
        )
        return source.variant(clips=[clip for clip in source.clips if clip.key not in leaked])

    def _make(self, split: str) -> ClipDataset:
        listed, store = self._splits.read(split)
        clips = self._train_clips("train") if split == "train" else listed
        matches = Matches()
        if store is None:
            matches = self._matched(clips, split)
            store = FileStore(self._audio, matches.files)
            clips = [clip for clip in clips if clip.key in matches.files]
        examined_free = isinstance(store, (FileStore, HDF5Store))
        dataset = ClipDataset(
            clips,
            store,
            sample_rate=self._sample_rate,
            seconds=self._seconds[split],
            crop=self._crops[split],
            seed=self._seed,
            strict=self._strict,
            # The header of audio in a table is read with all of it.
            check=self._check if examined_free or self._check == "decode" else "none",
            cache=self._cache,
        )
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
        announce(self.reports[split], check_counts=self._check_counts)
        return dataset

    def _matched(self, clips: Sequence[Clip], split: str) -> Matches:
        matches = self.match(clips, self._index, split)
        if not matches.files or (self._strict and matches.missing):
            raise AudioFileError(
                f"{self._audio}: {len(matches.missing)} of {len(clips)} clips of {self.dataset_name} {split} "
                f"have no file there ({some(matches.missing)}). It holds {self._index.count} audio files"
                + (f", such as {', '.join(self._index.names())}" if self._index.count else "")
                + f". Looked for {self.looked_for(clips[0])}. Pass their folder as `audio=`."
            )
        return matches

    @abstractmethod
    def looked_for(self, clip: Clip) -> str:
        """The names that the file of a clip may have, for an error.

        Args:
            clip: Any.
        """

    @cached_property
    def _index(self) -> FolderIndex:
        return FolderIndex(self._audio)

    def _train_clips(self, use: str) -> list[Clip]:
        return self._enriched_clips if self._enriched_in in (use, "both") else self._plain_clips

    @cached_property
    def _plain_clips(self) -> list[Clip]:
        clips, _ = self._splits.read("train")
        return clips if self._exclude is None else without(clips, self._exclude, f"{self.dataset_name} train")

    @cached_property
    def _enriched_clips(self) -> list[Clip]:
        if self._enriched is None:
            return self._plain_clips
        return enrich(self._plain_clips, self._enriched, self._enriched_mode, f"{self.dataset_name} train")
