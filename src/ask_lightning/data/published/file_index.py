"""Which file of a folder holds which clip, however it is named."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ask_lightning.data.clips import Clip, some
from ask_lightning.data.keys import AUDIO_SUFFIXES, plain_title, stem

Variants = Callable[[Clip], Iterable[tuple[str, str]]]
"""For a clip the names that its file may have, each after the pattern that it follows."""

_SECONDS = 10  # of every clip of AudioSet, but at the end of a video


class FolderIndex:
    """The audio files below a folder by name. The folder is read once, at construction.

    Args:
        folder: Where the files are, at any depth.

    Attributes:
        folder: As given.
        count: Number of files.

    Raises:
        FileNotFoundError: There is no such folder.

    Examples:
        >>> folder = getfixture("tmp_path") / "val"
        >>> folder.mkdir()
        >>> (folder / "YvfY_TJq7n_U.wav").touch()
        >>> FolderIndex(folder.parent).find("YvfY_TJq7n_U")
        ['val/YvfY_TJq7n_U.wav']
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder of audio files at {self.folder}.")
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_title: dict[str, list[str]] = defaultdict(list)
        for place, folders, names in os.walk(self.folder, followlinks=True):
            folders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                    path = Path(place, name).relative_to(self.folder).as_posix()
                    self._by_stem[stem(name).strip()].append(path)
                    self._by_title[plain_title(name)].append(path)
        self.count = sum(map(len, self._by_stem.values()))

    def find(self, name: str) -> list[str]:
        """The files of a name, with any ending of audio.

        Args:
            name: Without folder; with or without ending.

        Returns:
            Their paths relative to the folder.
        """
        return self._by_stem.get(stem(name), [])

    def find_title(self, name: str) -> list[str]:
        """The files whose names differ at most in signs and case.

        Args:
            name: As for `find`.
        """
        return self._by_title.get(plain_title(name), [])

    def names(self, count: int = 3) -> list[str]:
        """Some of the files.

        Args:
            count: How many at most.
        """
        return [path for paths in self._by_stem.values() for path in paths][:count]


@dataclass
class Matches:
    """What was found for the clips of a split.

    Attributes:
        files: Path of the file of each clip that has one, relative to the folder, by key.
        missing: The clips that have none, as their dataset calls them.
        variants: How many files follow which pattern.
        ambiguous: Clips with more than one file: what was chosen, and the others.
        shared: Files that were chosen for more than one clip.
    """

    files: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    variants: Counter[str] = field(default_factory=Counter)
    ambiguous: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What a user should look at; missing files are reported elsewhere.

        Examples:
            >>> Matches(shared=["a.wav"]).problems()
            ['1 files stand for more than one clip (a.wav)']
        """
        problems = []
        if self.ambiguous:
            problems.append(f"{len(self.ambiguous)} clips have more than one file ({some(self.ambiguous)})")
        if self.shared:
            problems.append(f"{len(self.shared)} files stand for more than one clip ({some(self.shared)})")
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
        clips: Of one split.
        index: Of the folder.
        variants: The names that the file of a clip may have.
        prefer: Words that the folders of its file may contain.
        reject: Words that they must not contain without one of those.

    Returns:
        What was found, and what was not.

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


LIKE_TITLE = "{file_name} with other signs"


def audiocaps_names(clip: Clip) -> list[tuple[str, str]]:
    """The names that the usual tools give to a clip of AudioCaps.

    Args:
        clip: Of `read_audiocaps`.

    Returns:
        Patterns and names.

    Examples:
        >>> clip = Clip("youtube:abc", ("rain",), "abc", start=30)
        >>> dict(audiocaps_names(clip))["{youtube_id}_{start}_{end}"]
        'abc_30_40'
    """
    video = clip.key.partition(":")[2].partition("@")[0]
    names = [("{youtube_id}", video), ("Y{youtube_id}", f"Y{video}")]
    if clip.start is not None:
        start, end = clip.start, clip.start + _SECONDS
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
        clip: Of `read_clotho`.

    Returns:
        Patterns and names.

    Examples:
        >>> clotho_names(Clip("freesound:12", ("rain",), "Rain 1.wav"))[0]
        ('{file_name}', 'Rain 1.wav')
    """
    names = [("{file_name}", clip.name)]
    names += [("{sound_id}", number) for number in _numbers(clip, "freesound")]
    return [*names, (LIKE_TITLE, clip.name)]


def wavcaps_names(clip: Clip) -> list[tuple[str, str]]:
    """The names that a clip of WavCaps may have.

    Args:
        clip: Of `read_wavcaps`.

    Returns:
        Patterns and names.

    Examples:
        >>> wavcaps_names(Clip("youtube:b0RFKhbpFJA", ("wind",), "Yb0RFKhbpFJA.wav"))
        [('{id}', 'Yb0RFKhbpFJA.wav'), ('{id} without Y', 'b0RFKhbpFJA')]
    """
    names = [("{id}", clip.name)]
    names += [("{id} without Y", video) for video in _numbers(clip, "youtube") if video != stem(clip.name)]
    return names


def _numbers(clip: Clip, namespace: str) -> list[str]:
    keys = (clip.key, *clip.aliases)
    return [rest for space, _, rest in (name.partition(":") for name in keys) if space == namespace]


def _folder_words(path: str) -> frozenset[str]:
    folders = path.lower().split("/")[:-1]
    return frozenset(word for folder in folders for word in re.split(r"[^a-z0-9]+", folder))
