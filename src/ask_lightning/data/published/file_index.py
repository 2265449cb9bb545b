"""Finds the audio file of each clip in a folder, under the names that the usual tools give."""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ask_lightning.data.clips import Clip, abbreviate
from ask_lightning.data.keys import AUDIO_SUFFIXES, file_stem, normalize_title

Variants = Callable[[Clip], Iterable[tuple[str, str]]]
"""Function from a clip to the patterns and names that its file may have."""

_CLIP_SECONDS = 10  # length of every clip of AudioSet, unless the video ends before


class FolderIndex:
    """The audio files below a folder by name. The folder is read once, at construction.

    Args:
        folder: Folder of the files, which may lie at any depth.
        suffixes: Endings of the names of audio files, in lower case with their dots.

    Attributes:
        folder: The folder.
        count: Number of audio files.

    Raises:
        FileNotFoundError: There is no such folder.

    Examples:
        >>> folder = getfixture("tmp_path") / "val"
        >>> folder.mkdir()
        >>> (folder / "YvfY_TJq7n_U.wav").touch()
        >>> FolderIndex(folder.parent).find("YvfY_TJq7n_U")
        ['val/YvfY_TJq7n_U.wav']
    """

    def __init__(self, folder: str | Path, suffixes: Collection[str] = AUDIO_SUFFIXES) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder of audio files at {self.folder}.")
        self._paths: list[str] = []
        for place, folders, names in os.walk(self.folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not _leads_back(place, name))
            inside = Path(place).relative_to(self.folder).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            self._paths += [
                f"{prefix}{name}" for name in sorted(names) if os.path.splitext(name)[1].lower() in suffixes
            ]
        self.count = len(self._paths)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return self._grouped(lambda name: file_stem(name).strip())

    @cached_property
    def _by_title(self) -> dict[str, list[str]]:
        return self._grouped(normalize_title)

    def _grouped(self, kind: Callable[[str], str]) -> dict[str, list[str]]:
        """The paths by something that the names of the files have in common."""
        groups: dict[str, list[str]] = defaultdict(list)
        for path in self._paths:
            groups[kind(posixpath.basename(path))].append(path)
        return groups

    def find(self, name: str) -> list[str]:
        """The files with a name, with any ending of audio.

        Args:
            name: Name without folder, with or without ending.

        Returns:
            Their paths relative to the folder.
        """
        return self._by_stem.get(file_stem(name), [])

    def find_title(self, name: str) -> list[str]:
        """The files whose names differ at most in punctuation and case.

        Args:
            name: Name without folder, with or without ending.
        """
        return self._by_title.get(normalize_title(name), [])

    def names(self, count: int = 3) -> list[str]:
        """The paths of some of the files.

        Args:
            count: Largest number of paths.
        """
        return self._paths[:count]


def _leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to one in which it was found."""
    folder = Path(place, name).absolute()
    return folder.is_symlink() and os.path.realpath(folder) in map(os.path.realpath, folder.parents)


@dataclass
class Matches:
    """The files that were found for the clips of a split.

    Attributes:
        files: Path of the file of each clip, relative to the folder, by key.
        missing: Names of the clips without a file.
        variants: Number of files by the pattern of their names.
        ambiguous: For each clip with more than one file the chosen path and the others.
        shared: Paths of files that were chosen for more than one clip.
    """

    files: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    variants: Counter[str] = field(default_factory=Counter)
    ambiguous: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Findings that a user should look at, except for missing files.

        Examples:
            >>> Matches(shared=["a.wav"]).problems()
            ['1 files stand for more than one clip (a.wav)']
        """
        problems = []
        if self.ambiguous:
            problems.append(
                f"{len(self.ambiguous)} clips have more than one file ({abbreviate(self.ambiguous)})"
            )
        if self.shared:
            problems.append(
                f"{len(self.shared)} files stand for more than one clip ({abbreviate(self.shared)})"
            )
        return problems


def match_files(
    clips: Sequence[Clip],
    index: FolderIndex,
    variants: Variants,
    *,
    prefer: Callable[[Clip], Iterable[str]] = lambda clip: (),
    reject: Callable[[Clip], Iterable[str]] = lambda clip: (),
) -> Matches:
    """Find the file of each clip.

    Where several fit, one in a folder that `prefer` names is chosen, then one that follows the pattern that
    most others follow.

    Args:
        clips: Clips of one split.
        index: Index of the folder of audio.
        variants: Function that returns the names that the file of a clip may have.
        prefer: Function that returns words of preferred folders.
        reject: Function that returns words of folders whose files are not taken, unless the path has a
            preferred word too.

    Returns:
        The files that were found, and the clips without.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> (folder / "YvfY_TJq7n_U.flac").touch()
        >>> clips = [Clip("youtube:vfY_TJq7n_U", ("ducks",), "vfY_TJq7n_U", start=130)]
        >>> match_files(clips, FolderIndex(folder), audiocaps_names).variants
        Counter({'Y{youtube_id}': 1})
    """
    found: dict[str, list[tuple[str, str]]] = {}
    popular: Counter[str] = Counter()
    for clip in clips:
        wanted, banned = frozenset(prefer(clip)), frozenset(reject(clip))
        candidates: dict[str, str] = {}
        if clip.path and (index.folder / clip.path).is_file():
            candidates[clip.path] = "{audio}"
        for pattern, name in variants(clip):
            paths = index.find_title(name) if pattern == LIKE_TITLE else index.find(name)
            if pattern == LIKE_TITLE and (candidates or len(paths) > 1):
                continue  # a likeness counts only where nothing better and nothing else is there
            for path in paths:
                words = _folder_words(path)
                if wanted & words or not banned & words:
                    candidates.setdefault(path, pattern)
        found[clip.key] = list(candidates.items())
        popular.update(set(candidates.values()))

    matches = Matches()
    for clip in clips:
        wanted = frozenset(prefer(clip))
        ranked = sorted(
            (not wanted & _folder_words(path), -popular[pattern], path, pattern)
            for path, pattern in found[clip.key]
        )
        if not ranked:
            matches.missing.append(clip.name)
            continue
        *_, path, pattern = ranked[0]
        matches.files[clip.key] = path
        matches.variants[pattern] += 1
        if len(ranked) > 1:
            others = ", ".join(other for _, _, other, _ in ranked[1:3])
            matches.ambiguous.append(f"{path}, not {others}")
    uses = Counter(matches.files.values())
    matches.shared = [path for path, count in uses.items() if count > 1]
    return matches


LIKE_TITLE = "{file_name} with other punctuation"


def audiocaps_names(clip: Clip) -> list[tuple[str, str]]:
    """The names that the usual download tools give to a clip of AudioCaps.

    Args:
        clip: Clip of `read_audiocaps`.

    Returns:
        Pairs of pattern and name.

    Examples:
        >>> clip = Clip("youtube:abc", ("rain",), "abc", start=30)
        >>> dict(audiocaps_names(clip))["{youtube_id}_{start}_{end}"]
        'abc_30_40'
    """
    video = clip.key.partition(":")[2].partition("@")[0]
    names = [("{youtube_id}", video), ("Y{youtube_id}", f"Y{video}")]
    if clip.start is not None:
        start, end = clip.start, clip.start + _CLIP_SECONDS
        spans = [
            ("{start}", f"{start}"),
            ("{start}_{end}", f"{start}_{end}"),
            ("{start_ms}_{end_ms}", f"{1000 * start}_{1000 * end}"),
            ("{start:.1f}_{end:.1f}", f"{start:.1f}_{end:.1f}"),
            ("{start:.3f}_{end:.3f}", f"{start:.3f}_{end:.3f}"),
            ("{start:06d}", f"{start:06d}"),
            ("{start:06d}_{end:06d}", f"{start:06d}_{end:06d}"),
        ]
        for prefix in ("", "Y"):
            names += [
                (f"{prefix}{{youtube_id}}_{pattern}", f"{prefix}{video}_{text}") for pattern, text in spans
            ]
    for alias in clip.aliases:
        namespace, _, number = alias.partition(":")
        if namespace == "audiocap":
            names.append(("{audiocap_id}", number))
    return names


def clotho_names(clip: Clip) -> list[tuple[str, str]]:
    """The names that a clip of Clotho may have.

    Args:
        clip: Clip of `read_clotho`.

    Returns:
        Pairs of pattern and name.

    Examples:
        >>> clotho_names(Clip("freesound:12", ("rain",), "Rain 1.wav"))[0]
        ('{file_name}', 'Rain 1.wav')
    """
    names = [("{file_name}", clip.name)]
    names += [("{sound_id}", number) for number in _names_in(clip, "freesound")]
    return [*names, (LIKE_TITLE, clip.name)]


def wavcaps_names(clip: Clip) -> list[tuple[str, str]]:
    """The names that a clip of WavCaps may have.

    Args:
        clip: Clip of `read_wavcaps`.

    Returns:
        Pairs of pattern and name.

    Examples:
        >>> wavcaps_names(Clip("youtube:b0RFKhbpFJA", ("wind",), "Yb0RFKhbpFJA.wav"))
        [('{id}', 'Yb0RFKhbpFJA.wav'), ('{id} without Y', 'b0RFKhbpFJA')]
    """
    names = [("{id}", clip.name)]
    names += [
        ("{id} without Y", video) for video in _names_in(clip, "youtube") if video != file_stem(clip.name)
    ]
    return names


def _names_in(clip: Clip, namespace: str) -> list[str]:
    keys = (clip.key, *clip.aliases)
    return [rest for space, _, rest in (name.partition(":") for name in keys) if space == namespace]


def _folder_words(path: str) -> frozenset[str]:
    """All words in the names of the folders of a path."""
    folders = path.lower().split("/")[:-1]
    return frozenset(word for folder in folders for word in re.split(r"[^a-z0-9]+", folder))
