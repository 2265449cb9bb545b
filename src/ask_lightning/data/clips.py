"""Captioned clips, and how the rows of a dataset become clips."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.keys import file_stem

LONG_CAPTION = 200
"""Number of words above which a caption is reported: most often a quotation mark was lost."""

_NAMES_SHOWN = 3
_LIST = re.compile(r"""\[(["']).*\1\]""", re.DOTALL)
# What pandas, R and spreadsheets write into a cell that holds nothing.
_NOTHING = frozenset({"nan", "NaN", "None", "NA", "N/A", "n/a", "null", "NULL", "<NA>", "#N/A"})


@dataclass(frozen=True)
class Clip:
    """One recording with all its captions.

    Attributes:
        key: Name of the recording that is the same in every dataset; see `ask_lightning.data.keys`.
        captions: At least one caption.
        name: Name of the clip in its own dataset: a YouTube id, the name of a file, a number.
        aliases: Other keys under which the recording may be listed.
        group: Name that clips share if they are takes of one recording, so that the captions of each are
            correct for all. Empty: the key.
        start: Start of the clip in its video in seconds, if the dataset has it.
        collection: Name of the collection, in a dataset that has several.
        path: Path of the audio file, if the dataset has it.
        row: Number of the row in a file that holds the audio of many clips, otherwise -1.

    Examples:
        >>> Clip("youtube:vfY_TJq7n_U", ("ducks quack",), name="vfY_TJq7n_U").keys
        frozenset({'youtube:vfY_TJq7n_U'})
    """

    key: str
    captions: tuple[str, ...]
    name: str
    aliases: tuple[str, ...] = ()
    group: str = ""
    start: int | None = None
    collection: str = ""
    path: str = ""
    row: int = -1

    @property
    def keys(self) -> frozenset[str]:
        """The key and the aliases."""
        return frozenset((self.key, *self.aliases))

    @property
    def recording(self) -> str:
        """What `clip_id` is computed from: the group if there is one, otherwise the key."""
        return self.group or self.key


class ClipCollector:
    """Takes the rows of a dataset one by one and makes clips of them.

    Rows with the same key become one clip. Oddities that do not prevent training are counted and named in one
    warning: empty captions and such as `nan` and `None`, which are left out; very long captions, lists
    written as one text, and repeated ids, which are kept.

    Args:
        source: Name of the file that is read, for the warning.

    Examples:
        >>> collector = ClipCollector("val.csv")
        >>> for line, caption in enumerate(["ducks quack", "a duck"], start=2):
        ...     key = "youtube:vfY_TJq7n_U"
        ...     collector.add(f"line {line}", key, [caption], name="vfY_TJq7n_U", repeated=False)
        >>> [clip.captions for clip in collector.clips()]
        [('ducks quack', 'a duck')]
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._captions: dict[str, list[str]] = {}
        self._aliases: dict[str, dict[str, None]] = {}
        self._first: dict[str, Clip] = {}
        self._empty: list[str] = []
        self._nothing: list[str] = []
        self._long: list[str] = []
        self._lists: list[str] = []
        self._repeated: list[str] = []

    def add(
        self,
        place: str,
        key: str,
        captions: Iterable[str],
        *,
        name: str,
        aliases: Iterable[str] = (),
        repeated: bool | None = None,
        group: str = "",
        start: int | None = None,
        collection: str = "",
        path: str = "",
        row: int = -1,
    ) -> None:
        """Take a row.

        Args:
            place: Place of the row in the file, for the warning.
            key: Key of the clip.
            captions: Captions in this row.
            name: Name of the clip in its dataset.
            aliases: Other keys of the clip.
            repeated: Whether the row repeats an id that should occur once. None: whether the key occurred
                before.
            group: Name that clips share if they are takes of one recording.
            start: Start of the clip in its video, in seconds.
            collection: Name of the collection, in a dataset that has several.
            path: Path of the audio file.
            row: Number of the row in the file that holds the audio.
        """
        first = self._first.get(key)
        if first and key.startswith("file:") and file_stem(first.name) != file_stem(name):
            # Two titles that differ in punctuation or case alone.
            key, aliases = f"file:{file_stem(name)}", [key, *aliases]
        repeated = key in self._first if repeated is None else repeated
        if repeated:
            self._repeated.append(f"{place} ({name!r})")
        clip = Clip(key, (), name, group=group, start=start, collection=collection, path=path, row=row)
        self._first.setdefault(key, clip)
        self._aliases.setdefault(key, {}).update(dict.fromkeys(aliases))
        texts = self._captions.setdefault(key, [])
        for caption in captions:
            text = caption.strip()
            if not text:
                self._empty.append(place)
            elif not given_text(text):
                self._nothing.append(f"{place} ({text!r})")
            elif not (repeated and text in texts):
                texts.append(text)
                words = len(text.split())
                if words > LONG_CAPTION:
                    self._long.append(f"{place} ({words} words)")
                if _LIST.fullmatch(text):
                    self._lists.append(place)

    def clips(self) -> list[Clip]:
        """Return the clips in the order in which they first appeared, and warn of oddities.

        Raises:
            ValueError: There is no clip with a caption.
        """
        clips = [
            replace(self._first[key], captions=tuple(captions), aliases=tuple(self._aliases[key]))
            for key, captions in self._captions.items()
            if captions
        ]
        if not clips:
            raise ValueError(
                f"{self._source} has no clip with a caption. Is it the right file, and complete?"
            )
        oddities = [
            ("captions are empty and left out", self._empty),
            ("captions say that there is none, and are left out", self._nothing),
            (
                f"captions have more than {LONG_CAPTION} words (a lost quotation mark? Each makes its batch "
                "as slow as it is long)",
                self._long,
            ),
            (
                "captions are written like a list of texts, and each is read as one text (give each a "
                "column or a row of its own, or keep lists in a parquet file)",
                self._lists,
            ),
            ("rows repeat an id, and their captions are put together", self._repeated),
        ]
        found = [f"{len(places)} {text}: {abbreviate(places)}" for text, places in oddities if places]
        if found:
            rank_zero_warn(f"{self._source}: {'; '.join(found)}.")
        return clips


def given_text(cell: str) -> str:
    """The text in a cell of a table, without the spaces around it; empty where it says that there is none.

    Args:
        cell: Content of the cell.

    Examples:
        >>> given_text(" rain "), given_text("nan"), given_text("None")
        ('rain', '', '')
    """
    text = cell.strip()
    return "" if text in _NOTHING else text


def count_captions(clips: Sequence[Clip]) -> int:
    """Number of captions of all clips together.

    Args:
        clips: Clips with their captions.

    Examples:
        >>> count_captions([Clip("file:a", ("rain", "it rains"), name="a.wav")])
        2
    """
    return sum(len(clip.captions) for clip in clips)


def abbreviate(names: Sequence[str], shown: int = _NAMES_SHOWN) -> str:
    """The first names of a list, and how many more there are.

    Args:
        names: Names to list.
        shown: Number of names that are written out.

    Examples:
        >>> abbreviate(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
