"""Clips of a published dataset, and how its rows become clips."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lightning.pytorch.utilities import rank_zero_warn

from ask_lightning.data.keys import stem

LONG_CAPTION = 200
"""Words from which on a caption is reported: most often a quotation mark was lost."""

_SHOWN = 3


@dataclass(frozen=True)
class Clip:
    """One recording with all its captions.

    Attributes:
        key: What it is called in every dataset; see `ask_lightning.data.keys`. Same key, same recording.
        captions: At least one.
        name: How its own dataset calls it: a YouTube id, the name of a file, a number.
        aliases: Other keys under which it may be listed.
        start: Where it starts in its video, in seconds, if the dataset says so.
        collection: Of a dataset that has several: which.
        path: Of its file, if the dataset says so.
        row: Its number in the file that holds the audio, if that is one file.

    Examples:
        >>> Clip("youtube:vfY_TJq7n_U", ("ducks quack",), name="vfY_TJq7n_U").keys
        frozenset({'youtube:vfY_TJq7n_U'})
    """

    key: str
    captions: tuple[str, ...]
    name: str
    aliases: tuple[str, ...] = ()
    start: int | None = None
    collection: str = ""
    path: str = ""
    row: int = -1

    @property
    def keys(self) -> frozenset[str]:
        """Its key and its aliases."""
        return frozenset((self.key, *self.aliases))


class ClipCollector:
    """Takes the rows of a dataset one by one and makes clips of them.

    Rows of one key become one clip. What is odd but no reason to stop is counted, and one warning names it:
    an empty caption, which is left out; a very long one and a repeated id, which are kept.

    Args:
        where: What is read, for the warning.

    Examples:
        >>> collector = ClipCollector("val.csv")
        >>> for line, caption in enumerate(["ducks quack", "a duck"], start=2):
        ...     key = "youtube:vfY_TJq7n_U"
        ...     collector.add(f"line {line}", key, [caption], name="vfY_TJq7n_U", repeated=False)
        >>> [clip.captions for clip in collector.clips()]
        [('ducks quack', 'a duck')]
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._captions: dict[str, list[str]] = {}
        self._aliases: dict[str, dict[str, None]] = {}
        self._first: dict[str, Clip] = {}
        self._empty: list[str] = []
        self._long: list[str] = []
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
        start: int | None = None,
        collection: str = "",
        path: str = "",
        row: int = -1,
    ) -> None:
        """Take a row.

        Args:
            place: Which row, for the warning.
            key: Of its clip.
            captions: Of the row.
            name: How the dataset calls the clip.
            aliases: Other keys of the clip.
            repeated: Whether an id that should be there once was there before. None: whether the key was.
            start: Of the clip in its video, in seconds.
            collection: Of a dataset that has several: which.
            path: Of its file.
            row: Its number in the file that holds the audio.
        """
        if key in self._first and stem(self._first[key].name) != stem(name) and key.startswith("file:"):
            # Titles that differ in signs only.
            key, aliases = f"file:{stem(name)}", [key, *aliases]
        repeated = key in self._first if repeated is None else repeated
        if repeated:
            self._repeated.append(f"{place} ({name!r})")
        first = Clip(key, (), name, start=start, collection=collection, path=path, row=row)
        self._first.setdefault(key, first)
        self._aliases.setdefault(key, {}).update(dict.fromkeys(aliases))
        texts = self._captions.setdefault(key, [])
        for caption in captions:
            text = caption.strip()
            if not text:
                self._empty.append(place)
            elif not (repeated and text in texts):
                texts.append(text)
                words = text.count(" ") + 1
                if words > LONG_CAPTION:
                    self._long.append(f"{place} ({words} words)")

    def clips(self) -> list[Clip]:
        """The clips in the order in which they first appeared.

        Raises:
            ValueError: There is no clip with a caption.
        """
        clips = [
            replace(self._first[key], captions=tuple(captions), aliases=tuple(self._aliases[key]))
            for key, captions in self._captions.items()
            if captions
        ]
        if not clips:
            raise ValueError(f"{self._where} has no clip with a caption. Is it the right file, and complete?")
        problems = [
            _problem("captions are empty and left out", self._empty),
            _problem(f"captions have more than {LONG_CAPTION} words (a lost quotation mark?)", self._long),
            _problem("rows repeat an id, and their captions are put together", self._repeated),
        ]
        found = [problem for problem in problems if problem]
        if found:
            rank_zero_warn(f"{self._where}: {'; '.join(found)}.")
        return clips


def count_captions(clips: Sequence[Clip]) -> int:
    """How many captions the clips have together.

    Args:
        clips: Any.

    Examples:
        >>> count_captions([Clip("file:a", ("rain", "it rains"), name="a.wav")])
        2
    """
    return sum(len(clip.captions) for clip in clips)


def some(names: Sequence[str], shown: int = _SHOWN) -> str:
    """The first few names, and how many more there are.

    Args:
        names: Of anything.
        shown: How many to name.

    Examples:
        >>> some(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _problem(what: str, places: Sequence[str]) -> str:
    return f"{len(places)} {what}: {some(places)}" if places else ""
