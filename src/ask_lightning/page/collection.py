"""What the page searches, and how it chooses what to show. Axes: `N` clips, `d` width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ask_lightning.data.audio.decoding import AudioFileError


class QueryError(ValueError):
    """A query that cannot be answered; the page shows the message."""


@dataclass(frozen=True)
class Match:
    """A clip as an answer to a query.

    Attributes:
        row: Number of the clip, from 0 to N - 1.
        score: What the answer is sorted by: the calibrated score, or the cosine.
        cosine: Cosine similarity of the query and what it was compared with.
        caption: The caption that is shown with the clip.
    """

    row: int
    score: float
    cosine: float
    caption: str


@dataclass(frozen=True, eq=False)
class Collection:
    """Clips that can be searched and heard.

    Attributes:
        title: Words that say which clips these are.
        names: Names of the N clips.
        captions: All captions of each of the N clips.
        files: Audio file of each of the N clips; None for those that cannot be heard.
        embeddings: Embeddings of the clips, `(N, d)`.
        by_text: Function that ranks all clips for a text, best first; the second argument says whether by
            calibrated scores. It raises `QueryError` for a text that cannot be used.
        by_sound: Function that ranks clips or captions for the path of an audio file, best first, in the same
            way.
        calibration: Words that name the calibration of the clips; empty for clips without one.
    """

    title: str
    names: Sequence[str]
    captions: Sequence[Sequence[str]]
    files: Sequence[Path | None]
    embeddings: Tensor
    by_text: Callable[[str, bool], list[Match]]
    by_sound: Callable[[Path, bool], list[Match]]
    calibration: str = ""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Answer:
    """What a query has found.

    Attributes:
        query: The text, or the path of an audio file. None: nothing has been asked yet.
        matches: All clips, best first, each once.
        calibrated: Whether the clips are sorted by calibrated scores.
        problem: The reason why there are no matches; empty if there are.
    """

    query: str | Path | None = None
    matches: tuple[Match, ...] = ()
    calibrated: bool = False
    problem: str = ""


def answer_query(collection: Collection, query: str | Path | None, calibrated: bool = False) -> Answer:
    """Search a collection.

    Args:
        collection: The clips.
        query: A text, or the path of an audio file. None: nothing to ask, which is answered by a problem.
        calibrated: Whether to sort by calibrated scores, where the collection has a calibration.

    Returns:
        All clips, best first. For a sound the score of a clip is that of its best caption. A query that
        cannot be used is answered by a problem.
    """
    if query is None or (isinstance(query, str) and not query.strip()):
        return Answer(query, problem="There is nothing to search for. Type some words or choose a sound.")
    calibrated = calibrated and bool(collection.calibration)
    try:
        if isinstance(query, str):
            matches = collection.by_text(query, calibrated)
        else:
            matches = collection.by_sound(query, calibrated)
    except (AudioFileError, QueryError) as error:
        message = str(error)
        if isinstance(query, Path):  # the name that the user knows, not that of the upload
            message = message.replace(str(query), query.name)
        return Answer(query, problem=message)
    return Answer(query, tuple(best_of_each_clip(matches)), calibrated)


def best_of_each_clip(matches: Sequence[Match]) -> list[Match]:
    """Leave out all but the first match of each clip.

    Args:
        matches: Matches, best first.

    Examples:
        >>> found = [Match(3, 0.9, 0.9, "rain"), Match(1, 0.8, 0.8, "wind"), Match(3, 0.7, 0.7, "a storm")]
        >>> [match.caption for match in best_of_each_clip(found)]
        ['rain', 'wind']
    """
    first: dict[int, Match] = {}
    for match in matches:
        first.setdefault(match.row, match)
    return list(first.values())


def filter_matches(
    collection: Collection,
    matches: Sequence[Match],
    *,
    words: str = "",
    lowest: float | None = None,
    count: int = 10,
) -> list[Match]:
    """Choose the matches to show.

    Args:
        collection: The clips.
        matches: Matches, best first.
        words: Text that the name, the file name or a caption of a clip has to contain, in any case.
        lowest: Lowest score that is shown. None: all are.
        count: Largest number of matches.

    Returns:
        The first `count` of the matches that pass.
    """
    passed = [
        match
        for match in matches
        if (lowest is None or match.score >= lowest) and contains(collection, match.row, words)
    ]
    return passed[:count]


def contains(collection: Collection, row: int, words: str) -> bool:
    """Whether the name, the file name or a caption of a clip contains a text, in any case.

    Args:
        collection: The clips.
        row: Number of the clip.
        words: The text; spaces around it do not count.
    """
    wanted = words.strip().casefold()
    file = collection.files[row]
    texts = (collection.names[row], *collection.captions[row], *(() if file is None else (file.name,)))
    return any(wanted in text.casefold() for text in texts)
