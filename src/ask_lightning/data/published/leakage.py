"""Finds validation and test clips in a knowledge source.

Clotho was cut from FreeSound and AudioCaps from AudioSet, and so were two parts of WavCaps. Many clips of
WavCaps are therefore validation and test clips of the other two.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.clips import Clip, abbreviate
from ask_lightning.data.keys import plain_words
from ask_lightning.utilities.arguments import check_choice

LeakKind = Literal["id", "title", "caption"]

_KINDS: tuple[LeakKind, ...] = ("id", "title", "caption")


@runtime_checkable
class HasClips(Protocol):
    """Any object with clips, such as a `ClipDataset`."""

    clips: list[Clip]


Clips = Sequence[Clip] | HasClips


@dataclass(frozen=True)
class Leakage:
    """Clips that a source shares with evaluation sets. Lists hold keys of clips in the order of the source.

    Attributes:
        by_id: Clips with the id of an evaluation clip.
        by_title: Further clips with the title of an evaluation clip, where the ids of one of the two are
            unknown, such as those of Clotho without its metadata. A title such as `rain.wav` may agree by
            chance.
        by_caption: Further clips with a caption of an evaluation clip, punctuation and case aside. Short
            captions may agree by chance.
        num_clips: Number of clips of the source.
    """

    by_id: list[str]
    by_title: list[str]
    by_caption: list[str]
    num_clips: int

    def __bool__(self) -> bool:
        return bool(self.by_id or self.by_title or self.by_caption)


def find_leakage(source: Clips, *evaluation: Clips) -> Leakage:
    """Compare a knowledge source with validation and test sets, by id, title and caption.

    Args:
        source: Dataset with `clips`, or a sequence of clips.
        evaluation: Evaluation sets, each a dataset with `clips` or a sequence of clips.

    Returns:
        The shared clips.

    Examples:
        >>> test = [Clip("youtube:vfY_TJq7n_U", ("Ducks quack.",), "vfY_TJq7n_U")]
        >>> wavcaps = [Clip("youtube:vfY_TJq7n_U", ("Birds.",), "a"), Clip("bbc:1", ("ducks quack",), "b")]
        >>> find_leakage(wavcaps, test)
        Leakage(by_id=['youtube:vfY_TJq7n_U'], by_title=[], by_caption=['bbc:1'], num_clips=2)
    """
    clips = [clip for part in evaluation for clip in clips_of(part)]
    names = frozenset(name for clip in clips for name in _identity(clip))
    titles = frozenset(name for clip in clips for name in clip.keys if _is_title(name))
    captions = frozenset(plain_words(caption) for clip in clips for caption in clip.captions)
    found: dict[LeakKind, list[str]] = {kind: [] for kind in _KINDS}
    own = clips_of(source)
    for clip in own:
        # Titles decide where the ids of one of the two are not known.
        shared = clip.keys & (names | titles if all(map(_is_title, clip.keys)) else names)
        if not all(map(_is_title, shared)):
            found["id"].append(clip.key)
        elif shared:
            found["title"].append(clip.key)
        elif any(plain_words(caption) in captions for caption in clip.captions):
            found["caption"].append(clip.key)
    return Leakage(found["id"], found["title"], found["caption"], len(own))


def _identity(clip: Clip) -> list[str]:
    """The ids of a clip, or its titles if no id is known.

    Ids of captions are left out, because the id of the video identifies the clip already.
    """
    names = [name for name in clip.keys if not name.startswith("audiocap:")]
    return [name for name in names if not _is_title(name)] or names


def _is_title(name: str) -> bool:
    """Whether a key is the title of a recording, and not an id."""
    return name.startswith("file:")


def leaked_ids(source: Clips, *evaluation: Clips, by: Iterable[LeakKind] = ("id", "title")) -> list[str]:
    """The clips that a knowledge source shares with evaluation sets, as a list for `exclude`.

    Args:
        source: Dataset with `clips`, or a sequence of clips.
        evaluation: Evaluation sets, each a dataset with `clips` or a sequence of clips.
        by: Kinds of agreement that count: `"id"`, `"title"`, `"caption"`.

    Returns:
        Keys of the clips in the order of the source.

    Raises:
        ValueError: `by` holds anything else.

    Examples:
        >>> test = [Clip("youtube:vfY_TJq7n_U", ("Ducks quack.",), "vfY_TJq7n_U")]
        >>> leaked_ids([Clip("youtube:vfY_TJq7n_U", ("Birds.",), "a")], test)
        ['youtube:vfY_TJq7n_U']
    """
    kinds = tuple(by)
    for kind in kinds:
        check_choice("by", kind, _KINDS)
    leakage = find_leakage(source, *evaluation)
    lists: dict[LeakKind, list[str]] = {
        "id": leakage.by_id,
        "title": leakage.by_title,
        "caption": leakage.by_caption,
    }
    chosen = frozenset(name for kind in kinds for name in lists[kind])
    return [clip.key for clip in clips_of(source) if clip.key in chosen]


def check_leakage(source: Clips, *evaluation: Clips, name: str = "The knowledge source") -> Leakage:
    """Warn if a knowledge source contains validation or test clips.

    Args:
        source: Dataset with `clips`, or a sequence of clips.
        evaluation: Evaluation sets, each a dataset with `clips` or a sequence of clips.
        name: Name of the source in the warning.

    Returns:
        The shared clips; false if there are none.

    Examples:
        >>> bool(check_leakage([Clip("bbc:1", ("birds",), "1")], [Clip("file:a", ("rain",), "a.wav")]))
        False
    """
    leakage = find_leakage(source, *evaluation)
    if leakage:
        parts = [
            f"{len(keys)} by {kind} ({abbreviate(keys)})"
            for kind, keys in zip(_KINDS, (leakage.by_id, leakage.by_title, leakage.by_caption), strict=True)
            if keys
        ]
        rank_zero_warn(
            f"{name} shares clips with the evaluation sets: of {leakage.num_clips} clips {', '.join(parts)}. "
            "Leave them out with `exclude=leaked_ids(source, *evaluation)`, which takes those by id and "
            "title, or `KnowledgeSource(exclude_evaluation=True)`. Short captions repeat by chance."
        )
    return leakage


def clips_of(source: Clips) -> Sequence[Clip]:
    """The clips of a dataset, or the given clips.

    Args:
        source: Dataset with `clips`, or a sequence of clips.

    Raises:
        TypeError: The source is something else.

    Examples:
        >>> clips_of([])
        []
    """
    if isinstance(source, HasClips):
        return source.clips
    listed: Any = source
    if isinstance(listed, Sequence) and all(isinstance(clip, Clip) for clip in listed):
        return listed
    raise TypeError(
        f"A source has to be a dataset with `clips` or a sequence of clips, but got {type(source).__name__}. "
        "Read its annotations with read_audiocaps, read_clotho or read_wavcaps."
    )
