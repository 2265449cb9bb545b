"""WavCaps as a source of knowledge."""

from collections.abc import Sequence
from pathlib import Path

from ask_lightning.data.audio.decoding import AudioFileError
from ask_lightning.data.audio.options import AudioOptions
from ask_lightning.data.audio.stores import FileStore
from ask_lightning.data.caption_style import CaptionStyle
from ask_lightning.data.clip_dataset import ClipDataset
from ask_lightning.data.clips import Clip, abbreviate, count_captions
from ask_lightning.data.published.annotations import read_wavcaps
from ask_lightning.data.published.collections import COLLECTIONS
from ask_lightning.data.published.counts import SplitReport, log_report, report_table
from ask_lightning.data.published.exclusion import exclude_clips
from ask_lightning.data.published.file_index import FolderIndex, Matches, match_files, wavcaps_names
from ask_lightning.utilities.arguments import check_choice


class WavCaps(ClipDataset):
    """The clips of WavCaps whose audio is on disk.

    Args:
        root: Folder that holds, at any depth, the published JSON files (`as_final.json`, `bbc_final.json`,
            `fsd_final.json`, `sb_final.json`) and audio files named by id, those of each collection in a
            folder with its name (`AudioSet_SL`, `BBC_Sound_Effects`, `FreeSound`, `SoundBible`).
        audio: Settings by which the audio is read. None: `AudioOptions()`.
        collections: Names of the collections to use. None: those whose JSON is there.
        audio_folder: Folder of the audio files, relative to `root` or absolute. None: `root`.
        exclude: Clips to leave out: path of a list such as the published black lists, or ids, for example
            those that `leaked_ids` returns.
        caption_style: `"raw"` for captions as they are, `"plain"` for lower case without punctuation; see
            `ask_lightning.data.plain_caption`.
        check_counts: Whether to warn of clip counts that were never published.

    Attributes:
        reports: Report of each collection.

    Raises:
        AudioFileError: No clip has audio, or one has none and `audio.strict` is set.
        FileNotFoundError: There is no folder, or no JSON of a collection.
        ValueError: A collection is unknown, or a JSON is not as published.

    Examples:
        >>> from ask_lightning.data.synthetic.published_layouts import write_wavcaps
        >>> root = write_wavcaps(getfixture("tmp_path"), num_clips=4, seconds=1)
        >>> source = WavCaps(root, AudioOptions(seconds=1), check_counts=False)
        >>> source[0]["waveform"].shape
        torch.Size([32000])
    """

    def __init__(
        self,
        root: str | Path,
        audio: AudioOptions | None = None,
        *,
        collections: Sequence[str] | None = None,
        audio_folder: str | None = None,
        exclude: str | Path | Sequence[str] | None = None,
        caption_style: CaptionStyle = "raw",
        check_counts: bool = True,
    ) -> None:
        audio = AudioOptions() if audio is None else audio
        root = Path(root)
        folder = root if audio_folder is None else root / audio_folder
        tables = _find_tables(root, collections)
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
        if not clips or (audio.strict and missing):
            raise AudioFileError(
                f"{folder}: {len(missing)} clips of WavCaps have no file there ({abbreviate(missing)}). It "
                f"holds {index.count} audio files. Looked for files named by id, with any ending of audio, "
                "below folders named by collection. Pass their folder as `audio_folder`."
            )
        if exclude is not None:
            clips = exclude_clips(clips, exclude, "WavCaps")
        super().__init__(clips, FileStore(folder, files), audio, caption_style=caption_style)
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
            log_report(self.reports[collection], check_counts=check_counts)

    def report(self) -> str:
        """The reports of the collections as a table in Markdown."""
        return report_table(list(self.reports.values()))


def _find_tables(root: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """The JSON file of each collection."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of WavCaps at {root}. Correct the path.")
    known = {collection.name: collection.table for collection in COLLECTIONS}
    for name in names or ():
        check_choice("collections", name, tuple(known))
    tables: dict[str, Path] = {}
    for name in names or known:
        paths = sorted(root.rglob(known[name]))
        if paths:
            tables[name] = paths[0]
        elif names is not None:
            raise FileNotFoundError(f"{root}: there is no {known[name]} of the collection {name} below it.")
    if not tables:
        raise FileNotFoundError(
            f"{root}: there is no JSON of WavCaps below it. Looked for {', '.join(known.values())}."
        )
    return tables


def _own_folder(clip: Clip) -> list[str]:
    return [known.folder_word for known in COLLECTIONS if known.name == clip.collection]


def _other_folders(clip: Clip) -> list[str]:
    # FreeSound and SoundBible both number their clips.
    return [known.folder_word for known in COLLECTIONS if known.name != clip.collection]
