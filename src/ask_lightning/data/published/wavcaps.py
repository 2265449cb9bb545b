"""WavCaps as a source of knowledge."""

from collections.abc import Sequence
from pathlib import Path

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.audio.stores import FileStore
from ask_lightning.data.clip_dataset import Check, ClipDataset, Crop
from ask_lightning.data.clips import Clip, count_captions, some
from ask_lightning.data.published.annotations import read_wavcaps
from ask_lightning.data.published.counts import SplitReport, announce, table
from ask_lightning.data.published.file_index import FolderIndex, Matches, match_files, wavcaps_names
from ask_lightning.data.published.id_lists import without

# The name of the JSON that lists a collection, and the word by which its folder of audio is known.
_COLLECTIONS = {
    "AudioSet_SL": ("as_final.json", "audioset"),
    "BBC_Sound_Effects": ("bbc_final.json", "bbc"),
    "FreeSound": ("fsd_final.json", "freesound"),
    "SoundBible": ("sb_final.json", "soundbible"),
}


class WavCaps(ClipDataset):
    """The clips of WavCaps whose audio is on disk.

    Args:
        root: Folder that holds, at any depth, the published JSON files (`as_final.json`, `bbc_final.json`,
            `fsd_final.json`, `sb_final.json`) and audio files named by id, those of each collection in a
            folder with its name (`AudioSet_SL`, `BBC_Sound_Effects`, `FreeSound`, `SoundBible`).
        collections: Which of the four. None: those whose JSON is there.
        audio: Folder of the audio files, relative to `root` or absolute. None: `root`.
        exclude: Clips to leave out: a path of a list such as the published black lists, or ids, for example
            those that `leaked_ids` returns.
        sample_rate: Of the waveforms, in Hz.
        seconds: Length of a crop, and the longest that a waveform may be.
        crop: `"random"`, `"center"` or `"full"`; see `ClipDataset`.
        seed: Of the random crops, at least 0.
        strict: Whether a clip without usable audio is an error.
        check: `"header"`, `"decode"` or `"none"`; see `ClipDataset`.
        cache: None, `"memory"` or a folder; see `ClipDataset`.
        check_counts: Whether to warn of clip counts that were never published.

    Attributes:
        reports: The counts of each collection.

    Raises:
        AudioFileError: No clip has audio, or with `strict` one has none.
        FileNotFoundError: There is no folder, or no JSON of a collection.
        ValueError: A collection is unknown, or a JSON is not as published.

    Examples:
        >>> from ask_lightning.data.synthetic.published_layouts import write_wavcaps
        >>> root = write_wavcaps(getfixture("tmp_path"), num_clips=4, seconds=1)
        >>> source = WavCaps(root, seconds=1, check_counts=False)
        >>> source[0]["waveform"].shape
        torch.Size([32000])
    """

    def __init__(
        self,
        root: str | Path,
        *,
        collections: Sequence[str] | None = None,
        audio: str | None = None,
        exclude: str | Sequence[str] | None = None,
        sample_rate: int = 32000,
        seconds: float = 10.0,
        crop: Crop = "center",
        seed: int = 0,
        strict: bool = False,
        check: Check = "header",
        cache: str | None = None,
        check_counts: bool = True,
    ) -> None:
        root = Path(root)
        folder = root if audio is None else root / audio
        tables = _tables(root, collections)
        index = FolderIndex(folder)
        files: dict[str, str] = {}
        clips: list[Clip] = []
        found: dict[str, tuple[list[Clip], Matches]] = {}
        for collection, path in tables.items():
            listed = read_wavcaps(path, collection)
            matches = match_files(listed, index, wavcaps_names, prefer=_own_folder, reject=_other_folders)
            found[collection] = listed, matches
            files.update(matches.files)
            clips += [clip for clip in listed if clip.key in matches.files]
        missing = [name for _, matches in found.values() for name in matches.missing]
        if not clips or (strict and missing):
            raise AudioFileError(
                f"{folder}: {len(missing)} clips of WavCaps have no file there ({some(missing)}). It holds "
                f"{index.count} audio files. Looked for files named by id, with any ending of audio, below "
                "folders named by collection. Pass their folder as `audio=`."
            )
        if exclude is not None:
            clips = without(clips, exclude, "WavCaps")
        super().__init__(
            clips,
            FileStore(folder, files),
            sample_rate=sample_rate,
            seconds=seconds,
            crop=crop,
            seed=seed,
            strict=strict,
            check=check,
            cache=cache,
        )
        self.reports: dict[str, SplitReport] = {}
        for collection, (listed, matches) in found.items():
            own = [clip for clip in self.clips if clip.collection == collection]
            self.reports[collection] = SplitReport(
                "WavCaps",
                collection,
                len(listed),
                count_captions(listed),
                len(own),
                count_captions(own),
                matches.missing,
                matches.variants,
                matches.problems(),
            )
            announce(self.reports[collection], check_counts=check_counts)

    def report(self) -> str:
        """The counts of the collections as a table in Markdown."""
        return table(list(self.reports.values()))


def _tables(root: Path, collections: Sequence[str] | None) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of WavCaps at {root}.")
    unknown = [name for name in collections or () if name not in _COLLECTIONS]
    if unknown:
        raise ValueError(
            f"Argument `collections` has to hold some of {', '.join(_COLLECTIONS)}, but got {unknown[0]!r}."
        )
    tables: dict[str, Path] = {}
    for name in collections or _COLLECTIONS:
        file = _COLLECTIONS[name][0]
        paths = sorted(root.rglob(file))
        if paths:
            tables[name] = paths[0]
        elif collections is not None:
            raise FileNotFoundError(f"{root}: there is no {file} of the collection {name} below it.")
    if not tables:
        raise FileNotFoundError(
            f"{root}: there is no JSON of WavCaps below it. Looked for "
            f"{', '.join(file for file, _ in _COLLECTIONS.values())}."
        )
    return tables


def _own_folder(clip: Clip) -> tuple[str, ...]:
    return (_COLLECTIONS[clip.collection][1],) if clip.collection in _COLLECTIONS else ()


def _other_folders(clip: Clip) -> tuple[str, ...]:
    # FreeSound and SoundBible both number their clips.
    return tuple(word for name, (_, word) in _COLLECTIONS.items() if name != clip.collection)
